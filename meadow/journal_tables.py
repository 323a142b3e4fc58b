"""The tables of a run's journal."""

from __future__ import annotations

LATE = (
    # `since` is the first round that may count the answer, `counted` the one that did
    "CREATE TABLE late (round INTEGER, client TEXT, digest TEXT NOT NULL, since INTEGER NOT NULL,"
    " counted INTEGER, PRIMARY KEY (round, client))"
)
"""Answers that came after their round.  A journal of an older meadow has no such table."""

TABLES = (
    "CREATE TABLE facts (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    "CREATE TABLE notes (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    # state and metrics are NULL while the round is open
    "CREATE TABLE rounds (number INTEGER PRIMARY KEY, cohort TEXT NOT NULL,"
    " state TEXT, metrics TEXT)",
    "CREATE TABLE contributions (round INTEGER, client TEXT, digest TEXT NOT NULL,"
    " PRIMARY KEY (round, client))",
    "CREATE TABLE refusals (round INTEGER, client TEXT, reason TEXT NOT NULL,"
    " PRIMARY KEY (round, client))",
    LATE,
)
