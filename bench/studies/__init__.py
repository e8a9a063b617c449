"""The studies that made the numbers in the docs, a module each, run as `python -m crepe_deploy.bench.studies.ladder`, say.

May import everything; nothing else imports it.
"""
