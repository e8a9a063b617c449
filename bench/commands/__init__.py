"""The commands `bench`, `gate`, `report` and `bench init-ci`, each beside what it prints.

May import run, gate and report, inside functions only; nothing else imports it.
"""
