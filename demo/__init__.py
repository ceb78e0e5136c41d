"""The main job on one machine: a low-dose CT series through the node into a PACS, measured and shown.

``python -m demo`` (or ``make demo``); everything listens on 127.0.0.1 and is stopped at the end.
"""
