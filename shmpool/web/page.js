// The page: asks the serving process once a second, and shows the pool that was chosen.
//
// What it holds is bounded: the points and events that the server keeps, no more. While the page is hidden it asks
// nothing, and catches up afterwards. Texts of a pool (target, errors, reasons) are only ever textContent.

import { Plot, clock, element } from "./plot.js";

const PERIOD_MS = 1000;
const SPANS = [60, 120, 300, 600]; // of the time axis, seconds: the first that holds what there is
const EVENTS_MAX = 200;
const byId = (id) => document.getElementById(id);

// Figures as texts ----------------------------------------------------------------------------------------------------

function digits(value) {
  return value >= 99.95 ? value.toFixed(0) : `${+value.toFixed(value >= 9.995 ? 1 : 2)}`;
}

function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0 s";
  for (const [unit, scale] of [["ns", 1e9], ["µs", 1e6], ["ms", 1e3]]) {
    if (value * scale < 999.5) return `${digits(value * scale)} ${unit}`;
  }
  if (value < 119.5) return `${digits(value)} s`;
  const [day, hour, minute, second] = [value / 86400, value / 3600 % 24, value / 60 % 60, value % 60].map(Math.floor);
  if (day) return `${day} d ${hour} h`;
  return hour ? `${hour} h ${minute} min` : `${minute} min ${second} s`;
}

function count(value) {
  if (value === null || value === undefined) return "–";
  if (value < 10) return `${+value.toFixed(2)}`;
  if (value < 99999.5) return Math.round(value).toLocaleString("en");
  const [unit, scale] = value < 999.5e3 ? ["k", 1e3] : value < 999.5e6 ? ["M", 1e6] : ["G", 1e9];
  return `${digits(value / scale)} ${unit}`;
}

const share = (part, whole) => (whole ? `${+(part / whole * 100).toFixed(1)} %` : "–");
const rate = (figures, value) => (figures.interval ? value / figures.interval : null);
const FAILURES = ["timeouts", "exhausted", "refused", "dial_errors", "interrupted", "late_refusals"];
const failures = (figures) => FAILURES.reduce((sum, name) => sum + (figures[name] ?? 0), 0);

// Elements that stay, and change only where their text does ------------------------------------------------------------

function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function style(node, cls) {
  if (node.className !== cls) node.className = cls;
}

// Children of `parent` as many as `items`, each made by `make()` and filled by `fill(child, item)`.
function fill(parent, items, make, each) {
  while (parent.childElementCount > items.length) parent.lastElementChild.remove();
  while (parent.childElementCount < items.length) parent.append(make());
  items.forEach((item, at) => each(parent.children[at], item));
}

class Table {
  // columns: [{title, cls, of(row)}]; rank(row) is the class of a row.
  constructor(id, columns, rank = () => "") {
    this.columns = columns;
    this.rank = rank;
    this.count = byId(`${id}-count`);
    const head = document.createElement("thead"), row = head.insertRow();
    for (const { title, cls } of columns) row.append(element("th", cls ?? "", title));
    this.body = document.createElement("tbody");
    byId(id).append(head, this.body);
  }

  show(rows, note = `${rows.length}`) {
    put(this.count, note);
    fill(this.body, rows, () => this.row(), (line, row) => {
      style(line, this.rank(row));
      this.columns.forEach((column, at) => put(line.children[at], column.of(row)));
    });
  }

  row() {
    const line = document.createElement("tr");
    for (const { cls } of this.columns) line.append(element("td", cls ?? ""));
    return line;
  }
}

// The pool that is shown -----------------------------------------------------------------------------------------------

let chosen = null; // its name
let run = null; // the serving process that what follows is from
let points = [], nextPoint = 0, period = 1;
let events = [], nextEvent = 0;
let silentSince = null;

function forget() {
  [points, nextPoint, events, nextEvent] = [[], 0, [], 0];
}

const plots = [
  [{
    title: "Latency of get()", log: true, show: seconds,
    series: [{ name: "p50", cls: "blue", of: (p) => p.get_p50 }, { name: "p99", cls: "orange", of: (p) => p.get_p99 }],
  }],
  [{
    title: "Connections", show: count, whole: true,
    series: [
      { name: "in use", cls: "blue", area: true, of: (p) => p.in_use },
      { name: "dialing, checked, ending", cls: "violet", area: true, of: (p) => p.busy },
      { name: "idle", cls: "pale", area: true, of: (p) => p.idle },
      { name: "cap", cls: "dim", dash: true, step: true, of: (p) => p.cap },
    ],
  }],
  [{
    title: "Waiting calls", show: count, whole: true, height: 70,
    series: [{ name: "waiting", cls: "blue", area: true, of: (p) => p.waiting }],
  }, {
    title: "Time in the queue", log: true, show: seconds, height: 70,
    series: [{ name: "p99", cls: "orange", of: (p) => p.wait_p99 }],
  }],
  [{
    title: "Leases", unit: "per second", show: count, height: 160,
    series: [
      { name: "leases", cls: "blue", of: (p) => p.leases },
      { name: "calls without one", cls: "red", of: (p) => p.failures },
    ],
  }],
].flatMap((shared) => {
  const card = element("div", "card plot");
  byId("plots").append(card);
  return shared.map((options) => new Plot(card, options));
});

const workerRate = (of) => (row) => count(rate(row.recent, of(row)));
const workersTable = new Table("workers", [
  { title: "process", of: (w) => `${w.alive ? "" : "†"}${w.pid}` },
  { title: "held", of: (w) => `${w.held}` },
  { title: "idle", of: (w) => `${w.cached}` },
  { title: "waiting", of: (w) => `${w.waiting}` },
  { title: "gets/s", of: workerRate((w) => w.gets) },
  { title: "own cache", of: (w) => (w.successes ? share(w.hit_rate, 1) : "–") },
  { title: "get p50", of: (w) => (w.get_latency.count ? seconds(w.get_latency.p50) : "–") },
  { title: "p99", of: (w) => (w.get_latency.count ? seconds(w.get_latency.p99) : "–") },
  { title: "age", of: (w) => seconds(w.age) },
], (w) => (w.alive ? "" : "quiet"));

const connectionsTable = new Table("connections", [
  { title: "id", of: (c) => `${c.id}` },
  { title: "state", cls: "words", of: (c) => c.state },
  { title: "process", of: (c) => (c.cached_by === null ? `${c.holder ?? "–"}` : `~${c.cached_by}`) },
  { title: "since", of: (c) => seconds(c.since) },
  { title: "age", of: (c) => seconds(c.age) },
  { title: "leases", of: (c) => count(c.uses) },
  { title: "peer", cls: "words", of: (c) => [c.peer, ...c.flags].filter(Boolean).join(" ") },
], (c) => (c.flags.includes("overdue") ? "bad" : c.state === "leased" ? "" : c.state === "idle" ? "quiet" : "fair"));

const waitersTable = new Table("waiters", [
  { title: "process", of: (w) => `${w.pid ?? "–"}` },
  { title: "thread", of: (w) => `${w.thread}` },
  { title: "since", of: (w) => seconds(w.waited) },
  { title: "for", cls: "words", of: (w) => (w.wants.length === 5 ? "any" : w.wants.join(", ")) },
  { title: "", cls: "words", of: (w) => (w.state === "waiting" ? "" : "gets one now") },
]);

const TROUBLES = new Set(["discarded", "dial_failed", "down", "overdue", "died"]);
const eventsTable = new Table("events", [
  { title: "time", of: (e) => clock(e.time) },
  { title: "process", of: (e) => `${e.pid}` },
  { title: "kind", cls: "words", of: (e) => e.kind },
  { title: "", cls: "words wrap", of: (e) => e.says },
], (e) => (e.kind === "down" || e.kind === "died" ? "bad" : TROUBLES.has(e.kind) ? "fair" : ""));

function tiles(total, recent, workers) {
  const alive = workers.filter((worker) => worker.alive).length;
  const timed = (latency) => (latency.count ? latency : {});
  const get = timed(recent.get_latency), use = timed(recent.use_latency);
  const failed = failures(total), failing = failures(recent);
  const full = total.max_connections && total.in_use >= total.max_connections;
  return [
    ["In use", `${total.in_use}`, `of ${total.max_connections}, ${share(total.in_use, total.max_connections)}`, full ? "fair" : ""],
    ["Waiting", `${total.waiting}`, total.waiting ? `oldest ${seconds(total.oldest_wait)}` : "nobody", total.waiting ? "fair" : ""],
    ["Leases", count(rate(recent, recent.successes)), "per second", ""],
    ["get() takes", seconds(get.p50), `p99 ${seconds(get.p99)}`, ""],
    ["A lease lasts", seconds(use.p50), `p99 ${seconds(use.p99)}`, ""],
    ["From the own cache", share(recent.hits, recent.successes), "of the leases", ""],
    ["Calls without one", count(rate(recent, failing)), `per second, ${count(failed)} in all`, failing ? "bad" : ""],
    ["Workers", `${alive}`, total.recoveries ? `${count(total.recoveries)} died` : "none died", alive ? "" : "bad"],
  ];
}

const tile = () => {
  const made = element("div", "tile");
  made.append(element("span", "title"), element("b"), element("span", "more"));
  return made;
};

function showHead(pool, total) {
  put(byId("name"), pool.name);
  put(byId("state"), pool.status);
  style(byId("state"), `badge ${{ open: "good", paused: "fair", draining: "fair" }[pool.status] ?? "bad"}`);
  const over = pool.status === "ended" || pool.status === "dead";
  const down = total.upstream === "down" || total.upstream === "probing";
  put(byId("server"), down ? `server down: ${total.upstream_error}` : `server ${total.upstream === "up" ? "up" : "not tried yet"}`);
  style(byId("server"), `badge ${down ? "bad" : total.upstream === "up" && !over ? "good" : ""}`);
  const age = pool.taken_at - total.created_at;
  put(byId("about"), `${total.target} · ${seconds(Math.max(0, age))} old · cap ${total.max_connections} · made by process ${total.pid}`);
}

const WRONGS = {
  timeouts: "timeouts", exhausted: "exhausted", refused: "refused", dial_errors: "dial errors", interrupted: "interrupted",
  late_refusals: "late refusals", recoveries: "dead workers", recovered_leases: "leases taken back", leaks: "leaks",
  overdue_leases: "leases overdue", health_failures: "failed checks", failed_deposits: "failed deposits",
};

function troubles(total) {
  return Object.entries(WRONGS).filter(([name]) => total[name]).map(([name, what]) => `${what} ${count(total[name])}`);
}

const LAST_SEEN = "Below is what was seen last.";

function alertsOf(pool) {
  const total = pool.total, late = pool.now - (pool.taken_at ?? pool.now);
  const found = [];
  if (pool.status === "damaged") found.push(["bad", `This pool cannot be read: ${pool.error}`]);
  const how = total?.state === "closed" ? "it was closed" : "no process has it any more";
  if (pool.status === "ended") found.push(["bad", `This pool ended at ${clock(pool.ended_at)}: ${how}. ${LAST_SEEN}`]);
  if (pool.status === "dead") found.push(["bad", `No process has this pool any more. ${LAST_SEEN}`]);
  if (pool.status === "paused") found.push(["fair", "This pool is paused: callers wait until it is resumed."]);
  if (pool.status === "draining") found.push(["fair", "This pool is draining: new callers are refused."]);
  const isLive = ["open", "paused", "draining", "closed"].includes(pool.status);
  if (isLive && late > 5) found.push(["fair", `The serving process has not looked at this pool for ${seconds(late)}.`]);
  if (isLive && total.upstream_down_for) {
    const retry = total.upstream === "probing" ? "one dial is under way" : `next dial in ${seconds(total.upstream_retry_in)}`;
    found.push(["bad", `The server has been down for ${seconds(total.upstream_down_for)}, ${retry}: ${total.upstream_error}`]);
  }
  for (const each of (pool.connections ?? []).filter((connection) => connection.flags.includes("overdue")).slice(0, 3)) {
    found.push(["bad", `Process ${each.holder} has had connection ${each.id} for ${seconds(each.since)}: it is overdue.`]);
  }
  const trouble = total ? troubles(total) : [];
  if (trouble.length) found.push(["calm", `Trouble since it began: ${trouble.join(", ")}`]);
  return found;
}

function showAlerts(alerts) {
  fill(byId("alerts"), alerts, () => element("p"), (line, [cls, text]) => {
    style(line, cls);
    put(line, text);
  });
}

function showPool(pool) {
  const { total, recent, workers, connections, waiters } = pool;
  byId("pool").hidden = !total;
  if (!total) return;
  showHead(pool, total);
  fill(byId("tiles"), tiles(total, recent, workers), tile, (each, [title, value, more, cls]) => {
    style(each, `tile ${cls}`);
    put(each.children[0], title);
    put(each.children[1], value);
    put(each.children[2], more);
  });
  const byUse = [...workers].sort((a, b) => b.alive - a.alive || b.gets - a.gets || a.index - b.index);
  const alive = workers.filter((worker) => worker.alive).length;
  workersTable.show(byUse.map((worker) => ({ ...worker, recent })), `${alive}; rates of the last second; † has ended`);
  const order = (state) => ["leased", "offered", "dialing", "checking", "retiring", "idle"].indexOf(state);
  const bySince = [...connections].sort((a, b) => order(a.state) - order(b.state) || (b.since ?? 0) - (a.since ?? 0));
  connectionsTable.show(bySince, `${connections.length} of ${total.max_connections}; ~ idle in that process's cache`);
  waitersTable.show(waiters);
  const lost = pool.events_lost ? `; ${pool.events_lost} were lost` : "";
  eventsTable.show(events.slice(-EVENTS_MAX).reverse(), `the newest first${lost}`);
  showPlots(pool);
}

function showPlots(pool) {
  const isOver = pool.status === "ended" || pool.status === "dead" || pool.status === "damaged";
  const to = isOver && points.length ? points.at(-1).time : pool.now;
  const span = SPANS.find((each) => !points.length || to - points[0].time <= each) ?? SPANS.at(-1);
  for (const plot of plots) plot.set(points, period, to - span, to);
}

function showPools(pools) {
  const over = (pool) => pool.status === "ended" || pool.status === "dead";
  const livingFirst = [...pools].sort((a, b) => over(a) - over(b));
  fill(byId("pools"), livingFirst, () => document.createElement("a"), (link, pool) => {
    const down = pool.upstream === "down" || pool.upstream === "probing";
    const figures = over(pool) || pool.in_use === null ? pool.status : `${pool.in_use}/${pool.max_connections}`;
    put(link, `${pool.name} ${figures}${pool.status === "paused" || pool.status === "draining" ? ` ${pool.status}` : ""}`);
    style(link, over(pool) ? "over" : pool.status === "damaged" || down ? "bad" : "");
    link.href = `#${encodeURIComponent(pool.name)}`;
    link.title = pool.error || pool.target;
    if (pool.name === chosen) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  });
}

function say(text) {
  byId("nothing").hidden = !text;
  put(byId("nothing"), text);
}

// Asking -----------------------------------------------------------------------------------------------------------

class Silence extends Error {}

// null: there is no such pool. Throws a Silence when there is no answer that makes sense.
async function ask(path) {
  try {
    const answer = await fetch(path, { signal: AbortSignal.timeout(10000) });
    if (answer.status === 404) return null;
    if (!answer.ok) throw new Error(await answer.text());
    return await answer.json();
  } catch (error) {
    throw new Silence(error.message);
  }
}

// The name after the # of the address.
function named() {
  const text = location.hash.slice(1);
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function choose(pools) {
  const wanted = named();
  const first = pools.find((pool) => !["ended", "dead", "damaged"].includes(pool.status)) ?? pools[0];
  const name = wanted || (pools.some((pool) => pool.name === chosen) ? chosen : first?.name ?? null);
  if (name !== chosen) forget();
  chosen = name;
}

async function look() {
  const all = await ask("/api/pools");
  if (all.run !== run) forget();
  run = all.run;
  choose(all.pools);
  document.title = chosen === null ? "shmpool" : `${chosen} – shmpool`;
  showPools(all.pools);
  if (chosen === null) return nothing("There are no pools of this user. They are shown when they come.");
  if (!all.pools.some((pool) => pool.name === chosen)) return nothing(`There is no pool ${chosen}.`);
  const path = `/api/pools/${encodeURIComponent(chosen)}`;
  const [pool, history] = await Promise.all([ask(`${path}?events=${nextEvent}`), ask(`${path}/history?since=${nextPoint}`)]);
  if (!pool || !history) return nothing(`There is no pool ${chosen}.`);
  if (pool.run !== run || history.run !== run) return undefined; // the serving process was started anew in between
  take(pool, history);
  say(pool.status === "absent" ? `There is no pool ${chosen} yet. It is shown when it comes.` : "");
  showAlerts(alertsOf(pool));
  showPool(pool);
  return undefined;
}

function take(pool, history) {
  events = [...events, ...pool.events].slice(-EVENTS_MAX);
  nextEvent = pool.next_event;
  const fresh = history.points.map((row) => Object.fromEntries(history.fields.map((name, at) => [name, row[at]])));
  points = [...points, ...fresh].slice(-history.points_max);
  nextPoint = history.next;
  period = history.period;
}

function nothing(text) {
  forget();
  byId("pool").hidden = true;
  showAlerts([]);
  say(text);
}

let asking = false;

async function turn() {
  if (asking || document.hidden) return;
  asking = true;
  try {
    await look();
    silentSince = null;
  } catch (error) {
    if (!(error instanceof Silence)) throw error;
    silentSince ??= Date.now() / 1000;
    const since = `The serving process has not answered since ${clock(silentSince)}`;
    showAlerts([["bad", `${since} (${error.message}): what is shown is old.`]]);
  } finally {
    asking = false;
    document.body.classList.toggle("old", silentSince !== null);
  }
}

window.addEventListener("hashchange", turn);
document.addEventListener("visibilitychange", turn);
setInterval(turn, PERIOD_MS);
turn();
