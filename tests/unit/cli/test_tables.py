"""Titles of tables say what the tables hold."""

from __future__ import annotations

from theworld_train.cli.tables import stage_table


def test_stages_of_which_nothing_was_measured_are_no_share_of_answers():
    stage = {"name": "a", "state": "complete", "trainable": 1, "steps": 1, "first_loss": 2.0, "last_loss": 1.0}
    group = {"predicted": {"value": 0.5}}
    measured = {"total": group, "kinds": {"digit": group}}
    assert stage_table({"pipeline": "p", "stages": [stage | {"eval": None}]}).title == "p: by stage"
    shown = stage_table({"pipeline": "p", "stages": [stage | {"eval": measured}]}).title
    assert shown == "p: share of held-out answers predicted, by stage"
