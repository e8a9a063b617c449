"""The public functions, a module each, named as the commands: they take what a person writes, and call the core.

`import crepe_deploy` offers them lazily. May import everything but the commands, `exporting` inside functions only;
only the commands and users import it.
"""
