/* module.h: what the two files that know Python share. The rest of the core includes neither this nor Python.h. */
#ifndef SHMPOOL_MODULE_H
#define SHMPOOL_MODULE_H

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "slab.h"

#define FASTCALL(function) ((PyCFunction)(void (*)(void))(function))

/* The slab as a dict; `fd` tells which workers are alive, -1: all are taken to be. Works on a read-only mapping. */
PyObject *snapshot_build(struct slab *slab, int fd);
/* Raise ValueError(what is wrong, whether it is a matter of versions); NULL. */
PyObject *raise_bad_slab(enum slab_verdict verdict);
extern PyType_Spec view_spec;

#endif
