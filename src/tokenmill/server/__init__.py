"""The serving front: OpenAI's API over HTTP, on an engine in a child process.

``tokenmill serve`` runs it (:mod:`tokenmill.server.run`); it needs the ``server`` extra.
"""
