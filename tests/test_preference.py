"""The preference of readers: contexts, blind sheets, and what is counted."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def preference():
    """eval/preference.py, which is a script with its neighbours on the path."""
    folder = ROOT / "eval"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location("preference", folder / "preference.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


def files(replies: dict[str, list[str]]) -> dict:
    contexts = {f"c{i}": [{"role": "user", "content": f"turn {i}"}] for i in range(len(next(iter(replies.values()))))}
    keyed = {arm: {f"c{i}": text for i, text in enumerate(texts)} for arm, texts in replies.items()}
    return {"data": (contexts, keyed)}


def judge(key: list[dict], choose) -> dict[str, str]:
    """Verdicts of a reader who sees through the key: `choose` says which arm wins, or None for a tie."""
    verdicts = {}
    for entry in key:
        if "item" in entry:
            winner, other = choose(entry), {"A": "B", "B": "A"}[entry["first"]]
            verdicts[str(entry["item"])] = "tie" if winner is None else entry["first"] if winner == 0 else other
    return verdicts


def test_arms_of_other_llms_are_trained_ones_and_decode_as_the_packaged_checkpoint():
    """One sample each, so that nothing but the model differs."""
    arms = yaml.safe_load((ROOT / "eval" / "preference.yaml").read_text())["arms"]
    steps = yaml.safe_load((ROOT / "configs" / "study.yaml").read_text())["steps"]
    packaged = json.loads((ROOT / "modeling_vikdf" / "default_checkpoint" / "generation_config.json").read_text())
    decoding = {name: packaged[name] for name in ("do_sample", "temperature", "top_k", "min_p", "max_new_tokens")}
    swapped = {name: arm for name, arm in arms.items() if name.startswith("swap_")}
    assert len(swapped) == 10
    for name, arm in swapped.items():
        step = Path(arm["model"]).name
        assert step in steps and sorted(name.split("_")[1:]) == sorted(step.split("_"))
        alone = {"use_knowledge": False} if "untrained" in steps[step] else {}
        assert arm["call"] == decoding | alone


def test_a_sheet_says_nothing_about_arms(preference):
    content, key = preference.make_sheet([("one", "two")], files({"one": ["x"] * 40, "two": ["y"] * 40}), seed=0)
    assert [set(item) for item in content["items"]] == [{"item", "chat", "A", "B"}] * 40
    assert [item["item"] for item in content["items"]] == list(range(1, 41))
    assert "one" not in json.dumps(content["items"])
    first = [entry["first"] for entry in key]
    assert 10 < first.count("A") < 30  # the sides are drawn
    by_item = {entry["item"]: entry for entry in key}
    assert all(item[by_item[item["item"]]["first"]] == "x" for item in content["items"])
    order = [by_item[item["item"]]["context"] for item in content["items"]]
    assert order != sorted(order, key=lambda name: int(name[1:]))  # and so is the order


def test_equal_replies_are_ties_that_nobody_reads(preference):
    content, key = preference.make_sheet([("a", "b")], files({"a": ["same", "x"], "b": ["same", "y"]}), seed=0)
    assert len(content["items"]) == 1 and [entry.get("verdict") for entry in key] == ["tie", None]
    [result] = preference.tally(key, [{"reader": "r", "verdicts": judge(key, lambda entry: 0)}])
    assert result["preferred"] == pytest.approx(0.75) and result["equal"] == 1 and result["agreement"] is None


@given(st.lists(st.sampled_from([0, 1, None]), min_size=4, max_size=30), st.integers(0, 99))
def test_the_share_is_of_contexts_with_ties_halved(preference, winners, seed):
    texts = {"a": [f"a{i}" for i in range(len(winners))], "b": [f"b{i}" for i in range(len(winners))]}
    _, key = preference.make_sheet([("a", "b")], files(texts), seed)
    readers = [{"reader": "r", "verdicts": judge(key, lambda entry: winners[int(entry["context"][1:])])}]
    [result] = preference.tally(key, readers)
    expected = sum({0: 1.0, 1: 0.0, None: 0.5}[winner] for winner in winners) / len(winners)
    assert result["preferred"] == pytest.approx(expected)
    low, high = result["confidence_95"]
    assert low <= result["preferred"] + 1e-9 and result["preferred"] <= high + 1e-9


def test_agreement_is_the_share_of_equal_verdicts(preference):
    _, key = preference.make_sheet([("a", "b")], files({"a": list("wxyz"), "b": list("WXYZ")}), seed=1)
    one = {"reader": "one", "verdicts": judge(key, lambda entry: 0)}
    other = {"reader": "other", "verdicts": judge(key, lambda entry: 1 if entry["context"] == "c0" else 0)}
    [result] = preference.tally(key, [one, other])
    assert result["agreement"] == 0.75 and result["readers"] == [1.0, 0.75] and result["preferred"] == 0.875


@pytest.mark.parametrize(
    "verdicts, message", [({"1": "A"}, "differ in items"), ({"1": "A", "2": "C"}, "is one of A, B, tie")]
)
def test_a_reader_who_left_something_out_is_refused(preference, verdicts, message):
    _, key = preference.make_sheet([("a", "b")], files({"a": ["w", "x"], "b": ["y", "z"]}), seed=0)
    with pytest.raises(ValueError, match=message):
        preference.tally(key, [{"reader": "r", "verdicts": verdicts}])


@pytest.mark.parametrize(
    "reply, unsure",
    [
        ("I'm not sure what you mean.", True),
        ("i don't know", True),
        ("I am not really sure.", True),
        ("You don't know me!", False),
        ("Sure, I'm in.", False),
    ],
)
def test_replies_that_begin_unsure_are_counted(preference, reply, unsure):
    assert preference.describe([reply, "Yes."], cut=1) == {
        "unsure": unsure / 2,
        "cut": 0.5,
        "distinct_2": 1.0,
        "words": (len(reply.split()) + 1) / 2,
    }


def test_contexts_are_drawn_by_the_seed_and_written_as_people_write(preference, tmp_path):
    data = tmp_path / "d.jsonl"
    rows = [{"turns": [f"hello , i am number {i} .", "good ."]} for i in range(20)]
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    contexts = preference.draw_contexts(data, 5, seed=3)
    assert contexts == preference.draw_contexts(data, 5, seed=3) != preference.draw_contexts(data, 5, seed=4)
    assert contexts[0]["messages"][0]["content"].startswith("Hello, I am number ") and contexts[0]["human"] == "Good."


def test_the_four_steps(preference, tmp_path, monkeypatch, capsys):
    data, config, output = tmp_path / "chat.jsonl", tmp_path / "arms.yaml", tmp_path / "out"
    data.write_text("\n".join(json.dumps({"turns": [f"Turn {i}.", f"Reply {i}."]}) for i in range(6)) + "\n")
    config.write_text("arms:\n  people: {human: true}\n  shout: {human: true}\n")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["preference.py", *map(str, arguments)])
        preference.main()

    write = ["write", "--config", config, "--arms", "people", "shout", "--data", data]
    write += ["--contexts", 4, "--output", output]
    run(*write)
    written = json.loads((output / "chat/people.json").read_text())
    assert len(written["replies"]) == 4 and set(written["replies"].values()) < {f"Reply {i}." for i in range(6)}
    run(*write)  # what is there is kept
    with pytest.raises(SystemExit, match="other settings"):
        run(*write[:-3], 5, "--output", output)
    shouted = written | {"arm": "shout", "settings": {"human": True}}
    shouted["replies"] = {key: text.upper() for key, text in written["replies"].items()}
    (output / "chat/shout.json").write_text(json.dumps(shouted))
    run("show", "--arms", "people", "shout", "--data", data, "--replies", output, "--output", tmp_path / "all.md")
    rows = (tmp_path / "all.md").read_text().splitlines()
    assert len(rows) == 2 + 4 and all(row.split(" | ")[1].upper() + " |" == row.split(" | ")[2] for row in rows[2:])
    run("sheet", "--pairs", "people:shout", "--data", data, "--replies", output, "--output", tmp_path / "sheet")
    items = json.loads((tmp_path / "sheet/sheet.json").read_text())["items"]
    assert len(items) == 4 and all(item["A"].lower() == item["B"].lower() for item in items)
    # a reader who likes it quiet
    verdicts = {str(item["item"]): "B" if item["A"].isupper() else "A" for item in items}
    (tmp_path / "quiet.json").write_text(json.dumps({"reader": "quiet", "verdicts": verdicts}))
    run("tally", "--key", tmp_path / "sheet/key.json", "--judgements", tmp_path / "quiet.json", "--replies", output,
        "--output", tmp_path / "report.json")  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["kind"] == "preference" and report["readers"] == ["quiet"]
    assert report["pairs"][0]["preferred"] == 1 and report["replies"]["chat"]["people"]["cut"] == 0
    assert "| people | shout | **1.00**" in capsys.readouterr().out


def test_unknown_arms_are_named(preference, tmp_path, monkeypatch):
    config = tmp_path / "arms.yaml"
    config.write_text("arms:\n  people: {human: true}\n")
    arguments = ["write", "--config", config, "--arms", "peeple", "--data", "x.jsonl", "--output", tmp_path]
    monkeypatch.setattr(sys, "argv", ["preference.py", *map(str, arguments)])
    with pytest.raises(SystemExit, match="peeple"):
        preference.main()


def test_grades_are_put_beside_their_contexts(preference, tmp_path, monkeypatch, capsys):
    data = tmp_path / "chat.jsonl"
    data.write_text("\n".join(json.dumps({"turns": [f"Turn {i}.", f"Reply {i}."]}) for i in range(3)) + "\n")
    [first, *_] = sorted(context["key"] for context in preference.draw_contexts(data, None, 0))
    grades = {"data": {"chat": {first: {"Nice.": 7, "What?": 2}}}}
    (tmp_path / "grades.json").write_text(json.dumps(grades))
    arguments = ["grades", "--grades", tmp_path / "grades.json", "--data", data, "--output", tmp_path / "out.jsonl"]
    monkeypatch.setattr(sys, "argv", ["preference.py", *map(str, arguments)])
    preference.main()
    [line] = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert line == {"turns": ["Turn 0."], "replies": ["Nice.", "What?"], "grades": [7, 2]}
    grades["data"]["chat"]["elsewhere:1"] = {"A": 1, "B": 2}
    (tmp_path / "grades.json").write_text(json.dumps(grades))
    with pytest.raises(ValueError, match="elsewhere:1"):
        preference.main()


def test_the_page_of_results_has_the_table_of_the_report(preference):
    """So that what is printed is what was counted."""
    folder = ROOT / "eval" / "results" / "preference"
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert preference.table(report) in (ROOT / "eval" / "RESULTS.md").read_text(encoding="utf-8")
    key = json.loads((folder / "key.json").read_text(encoding="utf-8"))
    readers = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("judgements_*.json"))]
    assert preference.tally(key, readers) == report["pairs"]
    assert preference.describe_files(folder / "replies") == report["replies"]
