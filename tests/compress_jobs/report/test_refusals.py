"""What was refused, as people read it."""

from __future__ import annotations

import shlex

from cluster.bundle.manifest import Refused
from compress_jobs.report.refusals import counts, refusal_lines, remedy_lines


def other_base(name: str) -> Refused:
    return Refused("base", f"it was trained on {name!r}, this base is org/x; add --accept-base {shlex.quote(name)}")


def test_reasons_are_counted_the_most_frequent_first() -> None:
    refused = {str(i): Refused(reason, "") for i, reason in enumerate(["dora", "base", "corrupt", "base", "bias"])}
    assert counts(refused) == "2 base, 1 bias, 1 corrupt, 1 dora"


def test_each_is_told_once_those_of_one_reason_together() -> None:
    refused = {"a": Refused("zero", "z"), "b": Refused("dora", "d"), "c": Refused("zero", "z")}
    assert refusal_lines(refused) == ["refused    b (dora): d", "refused    a (zero): z", "refused    c (zero): z"]


def test_two_hundred_names_of_one_base_need_one_option() -> None:
    refused = {f"a{i}": other_base(f"/scratch/job-{i}/base") for i in range(200)}
    assert remedy_lines(refused)[-1].endswith(": --accept-base '/scratch/*'")


def test_few_names_are_given_whole_and_no_name_has_its_option() -> None:
    refused = {"a": other_base("org/it's"), "b": other_base("x"), "c": other_base("x")}
    options = shlex.split(remedy_lines(refused)[-1].partition(" base: ")[2])
    assert options == ["--accept-base", "org/it's", "--accept-base", "x"]
    refused["d"] = Refused("base", "its config names no base; add --accept-unnamed-base")
    assert remedy_lines(refused)[-1].endswith(" --accept-unnamed-base")


def test_a_message_that_was_cut_is_no_option() -> None:
    assert not remedy_lines({"a": Refused("base", "it was trained on 'x'; add --accept-base 'xyz...")})


def test_names_without_anything_in_common_are_left_to_the_messages() -> None:
    assert not remedy_lines({str(i): other_base(f"name-{i}") for i in range(20)})
