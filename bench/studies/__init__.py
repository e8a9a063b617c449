"""The studies that made the numbers in the docs, a module each: `python -m crepe_deploy.bench.studies.NAME`.

May import everything; nothing else imports it.
"""
