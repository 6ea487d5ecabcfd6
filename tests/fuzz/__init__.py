"""Hostile input: real small files, changed where it hurts, given to the commands that read them.

``python -m tests.fuzz --examples 100000`` runs for as long as it takes; ``test_fuzz.py`` is the minute of CI.
"""
