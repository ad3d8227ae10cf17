/* pool.pml: the core's protocols for spin, with a death possible before every step.
 *
 * Modelled, each part as its header has it:
 *   slots        core/slot.h: every change is a CAS from a seen word; core/pool.c: take, dial, install, release, retire
 *   connections  core/mailbox.h: the letter is deposited before the connect, peeked by leasers, drained before EMPTY
 *   waiters      core/waiter.h: enter, look, sleep, rematch, leave; wake-up, hand-over, summary bit, futexes
 *   workers      core/worker.h: an index is whose who holds the lock of its byte; the kernel drops it at death; a dead
 *                process may be followed by a newcomer
 *   recovery     core/recovery.c: under the dead one's lock, for all of the sweep; the recoverer may die in it too
 *
 * A step: each `atomic { mortal; ... }` is an atomic operation of the core on shared memory, or a system call. `mortal`
 * is death before it. Where two loads are one step, nobody but the looker can change the first between them, or (the
 * scan of the queue, below) it is said so.
 *
 * Abstracted, and why that is sound:
 *   sequence     a word never comes twice, so a CAS succeeds exactly if nobody has changed the slot since the look:
 *                `fresh[slot]` has a bit for each who looked, every change clears all. Numbers would grow for ever.
 *   ticket       whichever waiter is chosen: more orders than the queue has. A late CAS may match one that has entered
 *                anew, as waiter.h allows.
 *   order of get a look takes any idle, expired or empty slot that it meets, in one pass: more than pool_take() does.
 *   time         a hand-over is due, or not; an offer has expired, or not: either, at any moment. A slice ends when
 *                nothing else can happen (`timeout`), and EARLY times before that.
 *   death        who dies asleep is, for others, one that died before it slept. A kernel that drops a lock late is a
 *                process that dies late. Who leaves or dies may have no successor.
 *   PATIENT      a sleep with a shorter slice.
 *   descriptors  a copy of each connection is open somewhere, so only shutdown() by its letter or its holder ends it.
 * Simplified, and not sound: a scan of all cells of the queue is one step; tests/core/interleave.c
 * walks that on the code.
 * Not modelled: buckets and private connections, the upstream, steering, server mode, accounts and other counters,
 * several threads of one process, weak memory (every shared access here is seq_cst, as the core's CAS are).
 *
 * Checked: the assertions below, and that no run stands still before its end. `user[slot]` is a ghost: the living
 * process that may touch connection, row and mailbox.
 *
 * Sizes and parts, all by -D: N workers (2 or 3), S slots, KILLS, ROUNDS for each worker, EARLY slices; FULL (slots are
 * idle at first), WAITS (else who finds nothing gives up), GIVES_UP, FAILS, CHECKS, EVICTS, REVOKES, DISCARDS, HINTS,
 * NO_SLICE, OFFERS_END (no offer is left at the end: true while no addressee leaves and at most one process dies).
 * Each MUTANT_x is a fault that must be found (tests/test_model.py).
 * Not here: which configurations are run (tests/test_model.py), what they took (docs/verification.md).
 */
#ifndef N
#define N 2
#endif
#ifndef S
#define S 2
#endif
#ifndef KILLS
#define KILLS 1
#endif
#ifndef ROUNDS
#define ROUNDS 1
#endif
#ifndef EARLY
#define EARLY 0
#endif
#define CELLS 2
#define NONE 7

/* states of a slot */
#define EMPTY 1
#define DIALING 2
#define LEASED 3
#define IDLE 4
#define CHECKING 5
#define RETIRING 6
#define OFFERED 7
/* of a waiter, and of its futex */
#define FREE 0
#define WAITING 1
#define MATCHED 2
#define ASLEEP 0
#define WOKEN 1
/* of a mailbox: whose the first letter is */
#define NO_LETTER 0
#define FITS 1
#define FOREIGN 2

c_code {
    static void made(const char *from, const char *to)
    {
        static const char *seen[64][2];
        int i;
        for (i = 0; i < 64 && seen[i][0]; i++)
            if (seen[i][0] == from && seen[i][1] == to)
                return;
        if (i < 64) {
            seen[i][0] = from;
            seen[i][1] = to;
        }
        printf("move %s %s\n", from, to);
    }
}

/* The slab. */
byte state[S], owner[S], fresh[S];
byte letter[S];
byte cell[CELLS], cell_owner[CELLS], cell_slot[CELLS], futex[CELLS];
bit summary;
bit registered[N + 1];
bit listed[S]; /* HINTS */
/* The kernel: who holds the lock of each byte (process + 1), who sleeps; the server: what it has open. */
byte lock[N + 1];
bit sleeping[CELLS];
bit open[S];
/* Ghosts and budgets. */
byte user[S];
byte kills = KILLS, early = EARLY, done;
bit quiet; /* nothing could happen but the end of a slice, and nobody has got anything since */

#define LOOKED (1 << me)
#define TWIN (1 << (me + N + 1)) /* a second copy of a lease */
#define ME (me + 1)
#define MINE (index + 1)
#define mortal if :: kills > 0 -> kills--; goto dead :: true fi

#define seen(s) fresh[s] = fresh[s] | LOOKED
#define exclusive(x) (x != IDLE && x != OFFERED && x != EMPTY)

#ifdef MUTANT_LETTER_OF_ANOTHER
#define is_empty(letter) true
#else
#define is_empty(letter) (letter == NO_LETTER)
#endif

/* slot_move(), from the word that was looked at. Whoever else may touch the slot is dead, or it is a bug. */
#define move(s, FROM, TO, new_owner) \
    if \
    :: (fresh[s] & LOOKED) -> c_code { made(#FROM, #TO); }; store(s, FROM, TO, new_owner); won = 1 \
    :: else -> won = 0 \
    fi

#define store(s, FROM, TO, new_owner) \
    assert(state[s] == FROM); \
    assert(user[s] == 0 || user[s] == ME); \
    assert(TO != EMPTY || !open[s]); \
    assert(TO != EMPTY || is_empty(letter[s])); \
    state[s] = TO; \
    owner[s] = new_owner; \
    fresh[s] = (exclusive(TO) || TO == OFFERED -> LOOKED : 0); \
    user[s] = (exclusive(TO) -> ME : 0)

/* A lease is revoked: who holds it may not use it any more. */
#define revoke(s) \
    if \
    :: (fresh[s] & LOOKED) -> user[s] = 0 \
    :: else \
    fi; \
    move(s, LEASED, RETIRING, MINE)

/* Would the release of an earlier lease of this slot, once more, be accepted? */
#if defined(MUTANT_SEQUENCE_NOT_RAISED)
#define stale_fits(s) (state[s] == LEASED && owner[s] == MINE)
#elif defined(MUTANT_STALE_RELEASE_ACCEPTED)
#define stale_fits(s) (state[s] == LEASED)
#else
#define stale_fits(s) (fresh[s] & TWIN)
#endif

/* ---- the queue, the releaser's side ---- */

/* Any waiter for whom `fits` holds: k, and its owner. */
#define any_cell(fits) \
    if \
    :: summary && fits(0) -> k = 0; to = cell_owner[0] \
    :: summary && fits(1) -> k = 1; to = cell_owner[1] \
    :: else -> k = NONE \
    fi
#define waits(c) (cell[c] == WAITING)
#define waits_asleep(c) (cell[c] == WAITING && futex[c] == ASLEEP)

/* waiter_wake_first() */
inline wake_first()
{
    do
    :: atomic {
        mortal;
        any_cell(waits_asleep);
        if
        :: k == NONE -> break
        :: else
        fi
       }
       atomic {
        mortal;
        won = (futex[k] == ASLEEP);
        futex[k] = WOKEN
       }
       if
       :: won ->
        atomic { mortal; sleeping[k] = 0 }
        atomic {
            mortal;
            if
            :: cell[k] == WAITING && cell_owner[k] == to -> break
            :: else
            fi
        }
       :: else
       fi
    od;
    atomic { k = 0; to = 0; won = 0 }
}

/* wake(): `won` if it slept */
inline wake(c)
{
    atomic { mortal; won = (futex[c] == ASLEEP); futex[c] = WOKEN }
    if
    :: won -> atomic { mortal; sleeping[c] = 0 }
    :: else
    fi
}

/* waiter_first(): k, or NONE; a group seen empty loses its bit, and is looked at again */
inline first_waiter()
{
    atomic { mortal; any_cell(waits); won = (k == NONE && summary && cell[0] == FREE && cell[1] == FREE) }
    if
    :: won ->
        atomic { mortal; summary = 0 }
#ifndef MUTANT_BIT_CLEARED_WITHOUT_A_SECOND_LOOK
        atomic { mortal; won = (cell[0] != FREE || cell[1] != FREE) }
        if
        :: won ->
            atomic { mortal; summary = 1 }
            c = 0;
            do
            :: c == CELLS -> break
            :: else ->
                atomic { mortal; won = (cell[c] == WAITING) }
                if
                :: won -> wake(c)
                :: else
                fi;
                c++
            od;
            c = 0
        :: else
        fi
#endif
    :: else
    fi
}

/* pool_release_late() */
inline wake_if_any()
{
    atomic { mortal; won = summary }
    if
    :: won -> wake_first()
    :: else
    fi
}

/* waiter_offer(): `gone` when the slot is not ours any more, offered or lost */
inline offer()
{
    gone = 0;
    do
    :: first_waiter();
       if
       :: k == NONE -> break
       :: else
       fi;
       atomic {
        mortal;
        if
        :: cell[k] == WAITING && cell_owner[k] == to -> cell[k] = MATCHED; cell_slot[k] = s; won = 1
        :: else -> won = 0
        fi
       }
       if
       :: !won -> goto again
       :: else
       fi;
       atomic { mortal; move(s, LEASED, OFFERED, to) }
       if
       :: !won -> assert(user[s] != ME); wake(k); gone = 1; break
       :: else
       fi;
#ifndef MUTANT_OFFER_NOT_TAKEN_BACK
       atomic { mortal; won = (cell[k] == MATCHED && cell_owner[k] == to && cell_slot[k] == s) }
#endif
       if
       :: won -> wake_for_offer(); gone = 1; break
       :: else
       fi;
       atomic { mortal; move(s, OFFERED, LEASED, MINE) }
       if
       :: !won -> wake_first(); gone = 1; break
       :: else
       fi;
again: skip
    od;
    atomic { k = 0; to = 0; won = 0 }
}

/* wake_for_offer() */
inline wake_for_offer()
{
    wake(k);
    atomic { mortal; won = (!won || !(cell[k] == MATCHED && cell_owner[k] == to && cell_slot[k] == s)) }
    if
    :: won -> wake_first()
    :: else
    fi
}

/* pool_release(); the slot was LEASED by us */
inline release()
{
    atomic { mortal; won = summary; gone = 0 }
    if
    :: !won
    :: else -> /* nobody has waited for long: wake; else hand over */
        if
        :: gone = 0
        :: offer()
        fi
    fi;
    if
    :: gone -> gone = 0
    :: else ->
        give(s);
#ifndef MUTANT_RELEASE_DOES_NOT_LOOK_AGAIN
        if
        :: won -> wake_if_any()
        :: else
        fi
#endif
    fi
}

/* LEASED -> IDLE; who has it listed is the hint: in the local cache, or in the free-list. */
inline give(s)
{
#ifdef MUTANT_RELEASE_IS_CHECK_THEN_STORE
    atomic { mortal; won = ((fresh[s] & LOOKED) != 0) }
    if
    :: won -> atomic { mortal; store(s, state[s], IDLE, MINE) }
    :: else
    fi;
#else
    atomic { mortal; move(s, LEASED, IDLE, MINE); assert(won || user[s] != ME) }
#endif
#ifdef HINTS
    if
    :: won ->
        if
        :: true
        :: atomic { mortal; listed[s] = 1 }
        fi
    :: else
    fi
#endif
}

/* ---- the queue, the waiter's side ---- */

/* waiter_enter() when there is a place */
#define enter(c) cell[c] == FREE -> cell[c] = WAITING; cell_owner[c] = MINE; cell_slot[c] = 0; place = c

/* waiter_prepare() */
inline prepare()
{
    atomic { mortal; futex[place] = ASLEEP }
    atomic { mortal; summary = 1 }
}

/* waiter_sleep(): until woken, or for a slice. A word that is not ASLEEP any more means no sleep. */
inline sleep_a_slice()
{
    atomic {
        mortal;
        if
        :: futex[place] == ASLEEP -> sleeping[place] = 1
        :: else
        fi;
        if
        :: early > 0 -> early--; sleeping[place] = 0
        :: true
        fi
    }
    if
    :: atomic { !sleeping[place] -> mortal }
#if !defined(NO_SLICE) && !defined(MUTANT_WAKE_UP_TRUSTED)
    :: atomic { timeout -> assert(!quiet); quiet = 1; sleeping[place] = 0; late = 1 }
#endif
    fi
}

/* waiter_rematch(), waiter_leave(): the promise is in r, or NONE */
inline take_promise(after)
{
    if
    :: cell[place] == MATCHED && cell_owner[place] == MINE -> r = cell_slot[place]
    :: else -> r = NONE
    fi;
    if
    :: cell[place] != FREE && cell_owner[place] == MINE && (after == FREE || r != NONE) ->
        cell[place] = after;
        cell_slot[place] = 0;
        cell_owner[place] = (after == FREE -> 0 : MINE)
    :: else
    fi
}

/* pool_return_promise() */
inline return_promise()
{
    if
    :: r == NONE
    :: else ->
        atomic {
            mortal;
            if
            :: state[r] == OFFERED && owner[r] == MINE -> seen(r); won = 1
            :: else -> won = 0
            fi
        }
        if
        :: won -> atomic { mortal; move(r, OFFERED, IDLE, 0) }
        :: else
        fi;
        if
        :: won -> wake_if_any()
        :: else
        fi
    fi;
    r = 0
}

/* leave_queue() */
inline leave()
{
    atomic { mortal; take_promise(FREE) }
#ifndef MUTANT_WAKE_UP_NOT_PASSED_ON
    atomic { mortal; won = (futex[place] == WOKEN) }
    if
    :: won -> wake_first()
    :: else
    fi;
#endif
    place = NONE;
    return_promise()
}

/* ---- ends of connections ---- */

/* RETIRING by us -> EMPTY: pool_end() by the descriptor in the letter; pool_empty(), make_empty() */
inline end_by_letter(s)
{
#ifndef MUTANT_RECOVERY_DOES_NOT_END
    atomic {
        mortal;
        if
        :: letter[s] == FITS -> open[s] = 0
        :: else
        fi
    }
#endif
    make_empty(s)
}

inline make_empty(s)
{
#if !defined(MUTANT_LETTER_NOT_DRAINED) && !defined(MUTANT_LETTER_OF_ANOTHER)
    atomic { mortal; letter[s] = NO_LETTER }
#endif
    atomic { mortal; move(s, RETIRING, EMPTY, 0) }
    wake_if_any()
}

/* ---- recovery ---- */

/* recovery_sweep(): what worker number x left; we hold its lock. */
inline sweep(x)
{
#ifndef MUTANT_WAITERS_OF_THE_DEAD_STAY
    c = 0;
    do
    :: c == CELLS -> break
    :: else ->
        atomic {
            mortal;
            if
            :: cell[c] != FREE && cell_owner[c] == x + 1 -> cell[c] = FREE; cell_owner[c] = 0; cell_slot[c] = 0; won = 1
            :: else -> won = 0
            fi
        }
        if
        :: won -> wake(c)
        :: else
        fi;
        c++
    od;
#endif
    atomic { c = 0; s = 0 }
    do
    :: s == S -> break
    :: else ->
        atomic {
            mortal;
            if
            :: owner[s] == x + 1 && state[s] != EMPTY && state[s] != IDLE -> seen(s); what = state[s]
            :: else -> what = 0
            fi
        }
        take_over();
        s++
    od;
    s = 0;
    do
    :: s == S -> break
    :: else ->
        if
        :: took & (1 << s) -> end_by_letter(s)
        :: else
        fi;
        s++
    od;
    atomic { s = 0; took = 0 }
    wake_first()
}

/* take_over() */
inline take_over()
{
    atomic {
        won = 0;
        if
        :: what == 0
#ifdef MUTANT_OFFER_OF_THE_DEAD_FORGOTTEN
        :: what == OFFERED
#else
        :: what == OFFERED -> mortal; move(s, OFFERED, IDLE, 0); won = 0
#endif
        :: what == LEASED -> mortal; move(s, LEASED, RETIRING, MINE)
        :: what == DIALING -> mortal; move(s, DIALING, RETIRING, MINE)
        :: what == CHECKING -> mortal; move(s, CHECKING, RETIRING, MINE)
        :: what == RETIRING -> mortal; move(s, RETIRING, RETIRING, MINE)
        fi;
        if
        :: won -> took = took | (1 << s)
        :: else
        fi;
        what = 0;
        won = 0
    }
}

/* recovery_run() */
inline recover()
{
    d = 0;
    do
    :: d == N -> break
    :: else ->
        atomic {
            mortal;
            if
            :: d != index && registered[d] && lock[d] == 0 ->
                won = 1;
#ifndef MUTANT_LOOK_THEN_SWEEP
                lock[d] = ME
#endif
            :: else -> won = 0
            fi
        }
        if
        :: won ->
            won = 0;
#ifdef MUTANT_ROW_FREED_BEFORE_THE_SWEEP
            atomic { mortal; registered[d] = 0 }
            sweep(d);
#else
            sweep(d);
            atomic { mortal; registered[d] = 0 }
#endif
#ifndef MUTANT_LOOK_THEN_SWEEP
            atomic { mortal; lock[d] = 0 }
#endif
        :: else
        fi;
        d++
    od;
    d = 0
}

/* ---- a worker ---- */

/* May a look take this slot? A hint that is trusted shows no others. */
#ifdef MUTANT_HINT_TRUSTED
#define shown(s) (listed[s] || owner[s] == MINE)
#else
#define shown(s) true
#endif
/* May anyone take an offer that was not claimed in time? */
#ifdef MUTANT_OFFER_WITHOUT_A_TERM
#define has_a_term false
#else
#define has_a_term true
#endif

proctype worker(byte me)
{
    byte index, s, c, d, k, to, what, took, i, r, old = NONE, place = NONE, rounds = ROUNDS;
    bit won, gone, lost, late, recovered;
born:
    if /* find_place() */
    :: atomic { lock[0] == 0 -> mortal; lock[0] = ME; index = 0 }
    :: atomic { lock[1] == 0 -> mortal; lock[1] = ME; index = 1 }
#if N > 2
    :: atomic { lock[2] == 0 -> mortal; lock[2] = ME; index = 2 }
#endif
    fi;
    atomic { mortal; registered[index] = 1 }
#ifndef MUTANT_NEWCOMER_DOES_NOT_SWEEP
    sweep(index);
#endif
next:
    atomic {
        won = 0; gone = 0; lost = 0; late = 0; recovered = 0; s = 0; i = 0; what = 0;
        if
        :: rounds == 0 -> goto finished
        :: else -> rounds--
        fi;
        if
        :: goto look
#ifdef CHECKS
        :: what = CHECKING
#endif
#ifdef EVICTS
        :: what = IDLE
        :: what = OFFERED
#endif
#ifdef REVOKES
        :: what = LEASED
#endif
        fi;
        if
        :: s = 0
        :: s = S - 1
        fi
    }
#if defined(CHECKS) || defined(EVICTS) || defined(REVOKES)
    /* maintenance and steering: one slot is looked at, and changed */
    atomic {
        mortal;
        if
        :: what == CHECKING && state[s] == IDLE -> seen(s)
        :: what != CHECKING && what == state[s] -> seen(s)
        :: else -> goto next
        fi
    }
    atomic {
        mortal;
        if
        :: what == CHECKING -> move(s, IDLE, CHECKING, MINE)
        :: what == IDLE -> move(s, IDLE, RETIRING, MINE)
        :: what == OFFERED -> move(s, OFFERED, RETIRING, MINE)
        :: what == LEASED -> revoke(s)
        fi;
        if
        :: !won -> goto next
        :: else
        fi
    }
    if
    :: what == CHECKING ->
        atomic {
            mortal;
            if
            :: true -> move(s, CHECKING, IDLE, MINE); what = 0
            :: true -> move(s, CHECKING, RETIRING, MINE)
            fi;
            assert(won)
        }
    :: else
    fi;
    if
    :: what == 0 -> wake_if_any()
    :: else -> end_by_letter(s)
    fi;
    goto next;
#endif

look: /* pool_take() */
    if
    :: place == NONE
    :: else -> /* take_promised() */
        atomic {
            mortal;
            s = cell_slot[place];
            if
            :: cell[place] == MATCHED && state[s] == OFFERED && owner[s] == MINE -> seen(s); won = 1
            :: else -> won = 0
            fi
        }
        if
        :: won -> atomic { mortal; move(s, OFFERED, LEASED, MINE) }
            if
            :: won -> goto leased
            :: else
            fi
        :: else
        fi
    fi;
    do
    :: i == S -> break
    :: else ->
        atomic {
            mortal;
            s = (i + index) % S;
            i++;
            what = 0;
            if
            :: (state[s] == IDLE && shown(s)) || state[s] == EMPTY -> what = state[s]
            :: state[s] == OFFERED && has_a_term -> what = OFFERED /* it has expired */
            :: state[s] == OFFERED && !late
            :: else
            fi;
            if
            :: what -> seen(s)
            :: else
            fi
        }
#ifdef HINTS
        if
        :: what == IDLE && listed[s] -> atomic { mortal; listed[s] = 0 } /* freelist_take() */
        :: else
        fi;
#endif
        if
        :: what == IDLE -> atomic { mortal; what = 0; move(s, IDLE, LEASED, MINE) }
            if
            :: won -> goto leased
            :: else -> lost = 1
            fi
        :: what == OFFERED -> atomic { mortal; what = 0; move(s, OFFERED, LEASED, MINE) }
            if
            :: won -> goto leased
            :: else -> lost = 1
            fi
        :: what == EMPTY -> atomic { mortal; what = 0; move(s, EMPTY, DIALING, MINE) }
            if
            :: won -> goto dial
            :: else -> lost = 1
            fi
        :: else
        fi
    od;
    atomic {
        i = 0; s = 0;
        if
        :: lost -> lost = 0; goto look
        :: else
        fi
    }
    if
    :: !recovered -> recovered = 1; recover(); goto look
#ifdef WAITS
    :: true
#else
    :: recovered -> goto next
#endif
    fi;
#ifdef WAITS
    atomic { /* wait_turn() */
        mortal;
        if
        :: place != NONE -> goto standing
        :: else
        fi;
        if
        :: enter(0)
        :: else ->
            if
            :: enter(1)
            :: else -> goto next
            fi
        fi
    }
    prepare();
#ifdef MUTANT_WAITER_DOES_NOT_LOOK_AGAIN
    goto standing;
#else
    goto look;
#endif
standing:
    atomic { mortal; take_promise(WAITING) }
    if
    :: r == NONE ->
#ifdef GIVES_UP
        if
        :: leave(); goto next
        :: true
        fi;
#endif
        r = 0;
        sleep_a_slice();
        prepare();
#ifndef MUTANT_SLICE_WITHOUT_RECOVERY
        if
        :: late -> recover()
        :: else
        fi
#endif
    :: else -> return_promise(); prepare()
    fi;
    goto look;
#endif

dial: /* pool_name_connection(), the dial, pool_install() */
    i = 0;
#ifndef MUTANT_LETTER_OF_ANOTHER
    atomic { mortal; letter[s] = NO_LETTER }
#endif
#ifdef MUTANT_CONNECT_BEFORE_DEPOSIT
    atomic { mortal; open[s] = 1 }
#endif
    atomic { mortal; letter[s] = (letter[s] == NO_LETTER -> FITS : FOREIGN) }
#ifdef FAILS
    if
    :: goto failed
    :: true
    fi;
#endif
#ifndef MUTANT_CONNECT_BEFORE_DEPOSIT
    atomic { mortal; open[s] = 1 }
#endif
    atomic { mortal; move(s, DIALING, LEASED, MINE); assert(won) }
leased:
    i = 0;
    quiet = 0;
    atomic { mortal; assert(user[s] != ME || (letter[s] == FITS && open[s])) } /* the letter is peeked */
    if
    :: place == NONE
    :: else -> leave()
    fi;
    atomic {
        mortal;
        if
        :: old == NONE
        :: else -> assert(!stale_fits(old))
        fi;
        if
        :: user[s] == ME -> old = s; fresh[s] = fresh[s] | TWIN
        :: else
        fi
    }
    if
#ifdef DISCARDS
    :: atomic { mortal; move(s, LEASED, RETIRING, MINE) }
        if
        :: won -> atomic { mortal; open[s] = 0 } make_empty(s)
        :: else
        fi
#endif
    :: release()
    fi;
    goto next;
#ifdef FAILS
failed: /* pool_abandon() */
    atomic { mortal; letter[s] = NO_LETTER }
    atomic { mortal; move(s, DIALING, EMPTY, 0); quiet = 0 }
    wake_if_any();
    if
    :: place == NONE
    :: else -> leave()
    fi;
    goto next;
#endif

dead: /* the kernel drops its locks; somebody may begin in its place */
    atomic {
        d = 0;
        do
        :: d == N + 1 -> break
        :: else ->
            if
            :: lock[d] == ME -> lock[d] = 0
            :: else
            fi;
            d++
        od;
        d = 0;
        do
        :: d == S -> break
        :: else ->
            if
            :: user[d] == ME -> user[d] = 0
            :: else
            fi;
            fresh[d] = fresh[d] & ~(LOOKED | TWIN);
            d++
        od;
        d = 0; s = 0; c = 0; k = 0; to = 0; what = 0; took = 0; i = 0; r = 0; index = 0; old = NONE; place = NONE;
        won = 0; gone = 0; lost = 0; late = 0; recovered = 0; rounds = 0; quiet = 0;
        if
        :: rounds = 1; goto born
        :: true
        fi
    }
    goto ended;
finished: /* pool_leave(), or idle for ever */
    if
    :: atomic { mortal; registered[index] = 0 }
       atomic { mortal; lock[index] = 0 }
    :: true
    fi;
ended:
    atomic { index = 0; s = 0; old = NONE; done++ }
}

/* When nobody is active any more, somebody who lives recovers: every slot can then be leased once, and no place is lost. */
proctype survivor()
{
    byte me = N, index = N, s, c, d, k, to, what, took;
    bit won;
    atomic { done == N -> kills = 0 }
    recover();
    atomic {
        s = 0; c = 0; d = 0;
        do
        :: s == S -> break
        :: else ->
            assert(state[s] == EMPTY || state[s] == IDLE || (state[s] == OFFERED && has_a_term));
#ifdef OFFERS_END
            assert(state[s] != OFFERED);
#endif
            assert(state[s] == EMPTY || (open[s] && letter[s] == FITS));
            assert(user[s] == 0);
            assert(state[s] == EMPTY || shown(s));
            s++
        od;
        do
        :: c == CELLS -> break
        :: else -> assert(cell[c] == FREE); c++
        od;
        do
        :: d == N -> break
        :: else -> assert(registered[d] == (lock[d] != 0)); d++
        od;
        goto end
    }
dead:
    assert(false);
end:
    skip
}

init {
    atomic {
        byte s;
        lock[N] = N + 1;
        registered[N] = 1;
        do
        :: s == S -> break
        :: else ->
#ifdef FULL
            state[s] = IDLE; letter[s] = FITS; open[s] = 1; listed[s] = 1;
#else
            state[s] = EMPTY;
#endif
            s++
        od;
        s = 0;
        do
        :: s == N -> break
        :: else -> run worker(s); s++
        od;
        run survivor()
    }
}
