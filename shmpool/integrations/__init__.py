"""Client libraries on a shared pool, one module each, imported by name: `shmpool.integrations.redis`.

Nothing is imported here: each module needs a library that shmpool itself does not.
"""
