"""What both parties need from the machine: durable files, sockets, processes, the terminal.

This is the only shared code with IO; `umbel_common` has none.
"""
