"""The table in the documentation holds every case, with its times, and no other."""

from __future__ import annotations

from tests.faults import cases, document
from tests.faults.cases import CASES, LOST, Case


def test_the_table_is_that_of_the_cases():
    text = document.PATH.read_text(encoding="utf-8")
    known = document.times(text)
    assert document.render(known) == text, "run with UPDATE_FAULTS=1"
    assert len(CASES) >= 30 and len({case.name for case in CASES}) == len(CASES)
    assert not [case.name for case in CASES if not known[case.name]["whole"]], "never measured"


def test_ten_cases_run_always_and_every_case_has_a_test(request, repository):
    assert sum(case.plain for case in CASES) == 10, [case.name for case in CASES if case.plain]
    sources = "".join(path.read_text(encoding="utf-8") for path in (repository / "tests/faults").glob("test_*.py"))
    names = [name for name, value in vars(cases).items() if isinstance(value, Case) or (isinstance(value, list) and name not in ("CASES", "SINGLE"))]
    assert len(names) > 10 and not [name for name in names if f"cases.{name}" not in sources]


def test_a_rank_that_is_dead_is_noticed_within_its_bound():
    """What the table says was measured, and held by each case when it ran."""
    known = document.times(document.PATH.read_text(encoding="utf-8"))
    assert all(0 <= float(known[case.name]["noticed"]) < case.within_s for case in LOST)
