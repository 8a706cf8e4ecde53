"""What both daemons need of the machine that they run on: durable files, key files, the terminal.

The only shared code that does IO; `umbel_common` does none.
"""
