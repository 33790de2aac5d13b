"""Workers: one engine each, in a process of its own, driven line by line by ``tokenmill.bench.compare``.

They run in the engines' own virtual environments, where Tokenmill is not installed: nothing here but its own worker
imports it, and the syntax is that of Python 3.9. ``python FOLDER NAME`` starts the worker in ``FOLDER/NAME.py``.
"""
