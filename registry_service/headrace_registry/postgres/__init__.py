"""Postgres: the pool, the embedded server, migrations, and the stores that read, call decisions and write.

Only this room imports psycopg. A store's method is one transaction; decisions are functions of the rooms below.
"""
