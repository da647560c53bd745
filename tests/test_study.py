"""eval/study: what is trained and evaluated; means over seeds, differences, tables, plots."""

import json
import random
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import build_from, load_script
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import CHATML_WITH_GENERATION
from torch import nn

from modeling_vikdf.evaluation.reports import kind_of


ROOT = Path(__file__).parents[1]


@pytest.fixture
def collector(monkeypatch, tmp_path):
    module = load_script("study/collect")
    results = tmp_path / "eval" / "results"
    results.mkdir(parents=True)
    monkeypatch.setattr(module, "RESULTS", results)
    return module


def test_steps_of_the_study_fit_their_recipes():
    """What a step drops is in its recipe, and all parents are there."""
    steps = yaml.safe_load((ROOT / "configs" / "study.yaml").read_text())["steps"]
    trained = {name: step for name, step in steps.items() if "recipe" in step}
    assert len(trained) > 40
    assert all(step["parent"] in trained for step in steps.values() if "shrink" in step)
    for name, step in trained.items():
        assert ("parent" in step) + ("new" in step) + step["recipe"].endswith("distill.yaml") == 1, name
        assert step.get("parent", name) in steps, name
        recipe = yaml.safe_load((ROOT / "configs" / step["recipe"]).read_text())
        for each in step.get("drop", []):
            section, _, key = each.partition(".")
            assert section in recipe and (not key or key in recipe[section]), (name, each)


@pytest.mark.parametrize("llm, scale", [("gemma", 7.5), ("qwen", 0.125)])
def test_arms_of_another_llm_differ_in_the_llm_alone(llm, scale, monkeypatch, tmp_path):
    """Their recipes are those of the arms around SmolLM2, but for the scale of the LLM's embeddings; so is stage 1."""
    study, ran, built = load_script("study/train"), {}, []
    monkeypatch.setattr(study, "run_stage", lambda stage, recipe, collators: ran.update({_step(recipe): recipe}))
    monkeypatch.setattr(study, "new_model", lambda **settings: built.append(settings) or (Untrained(), Untrained()))
    config = ROOT / "configs" / "study.yaml"
    args = SimpleNamespace(config=config, output=tmp_path, pairs="p.tar", dialogues="d.jsonl", features="cache")
    steps, first = yaml.safe_load(config.read_text())["steps"], study.load_model_settings(config.parent)
    trained = ("vikdf", "caption_only", "no_distillation", "soft_prompt", "integrate", "integrate_captions")
    for arm in ("language_model", *trained):
        study.train(arm, 0, steps, args)
        study.train(f"{arm}_{llm}", 0, steps, args)
    swap = {"language_model": built[1]["language_model"]}
    assert built == [first, first | swap] and swap["language_model"] != first["language_model"]
    start = {"base_text": first["base_text"], "initial_gate": first["initial_gate"]}
    steps_of = set()
    for arm in trained:
        own, other = ran[arm], ran[f"{arm}_{llm}"]
        if arm.startswith("integrate"):
            assert other["model"] == own["model"] | swap | start
        elif "checkpoint" in own["model"]:
            assert other["model"]["checkpoint"] == f"{own['model']['checkpoint']}_{llm}"
        else:
            assert other["model"] == own["model"] | swap
        assert other["training"].pop("output_dir") == f"{own['training'].pop('output_dir')}_{llm}"
        rates, own_rates = (recipe["training"].pop("learning_rates") for recipe in (other, own))
        embedded = ("language_projection", "knowledge_base", "caption_shift")
        assert rates == {part: rate * (scale if part in embedded else 1) for part, rate in own_rates.items()}
        lengths = [recipe["training"].pop("max_steps") for recipe in (other, own)]
        steps_of.add((*lengths, arm.startswith("integrate")))
        assert {**other, "model": None} == {**own, "model": None}
        assert steps[arm].get("collators") == steps[f"{arm}_{llm}"].get("collators")
    assert len(steps_of) == 2  # equally many for all arms
    assert {"distill", "distill_captions"} == {name for name in ran if name.startswith("distill")}


def _step(recipe: dict) -> str:
    return Path(recipe["training"]["output_dir"]).name


class Untrained:
    system_prompt = None

    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)


@pytest.mark.parametrize(
    "text, written",
    [
        ("i love it ! so do i .", "I love it! So do I."),
        ("well , it ' s what i've heard ( from you ) .", "Well, it's what I've heard (from you)."),
        ("Wait . . . why ? !", "Wait... Why?!"),
        ("it cost $ 5 , i.e. 10 % more  than\tmine :)", "It cost $5, i.e. 10% more than mine :)"),
        ("A title of 1990 by AC/DC", "A title of 1990 by AC/DC"),
    ],
)
def test_tokenised_text_is_written_as_people_write(text, written):
    assert load_script("prepare_data").as_written(text) == written


@given(st.text(alphabet="ai' .,;:!?%)($5Zé\n", max_size=40))
def test_writing_changes_spaces_and_case_alone(text):
    as_written = load_script("prepare_data").as_written
    written = as_written(text)
    assert "".join(written.split()).lower() == "".join(text.split()).lower()
    assert as_written(written) == written


def test_visual_words_are_listed_alike_in_every_run():
    """Most frequent first; equally frequent ones not as Python happens to hash them, which differs by run."""
    captions = ["A zebra, a lion, a yak, a gnu and an otter."] * 20 + ["the lion, THE LION!"] + ["a heron"] * 19
    assert load_script("prepare_data").visual_words(captions) == ["lion", "gnu", "otter", "yak", "zebra"]


def test_dialogues_are_drawn_by_length_and_ending_of_replies():
    prepare = load_script("prepare_data")
    texts = ["A dog.", "A dog!", 'A "dog."', "A dog?", "a dog", "a dog :)", "A dog...", "(A dog!)", "a dog,", ""]
    assert [prepare.ending(text) for text in texts] == [".", "!", ".", "?", "", "", ".", "!", "", ""]
    marks = [*".!?!"] * 100 + [""] * 50  # of "." there are too few for more than 200 in all
    windows = [["What is it?", f"reply {i}{mark}"] for i, mark in enumerate(marks)]
    long = [["What is it?", "a reply that goes on and on."]] * 100
    drawn = prepare.draw_alike(windows + long, ["It is.", "A dog!", "My dog.", "my dog"], random.Random(0))
    assert Counter(prepare.ending(window[-1]) for window in drawn) == {".": 100, "!": 50, "": 50}
    assert 15 < sum(window[-1].endswith("!") for window in drawn[:100]) < 35, "of one mark all stand at the beginning"
    assert drawn == [window for window in windows if window in drawn]


@pytest.mark.parametrize(
    ("replies", "complaint"),
    [
        (["It is.", "Is it?"], "None of the 9 dialogues' replies of at most 2 words ends with '\\?', as 50 % of"),
        (["no", "no"], "None of the 0 dialogues' replies of at most 1 words ends without a mark, as 100 % of"),
        ([], "no dialogue whose replies"),
    ],
    ids=["a mark that no reply has", "all replies too long", "nothing to resemble"],
)
def test_dialogues_that_cannot_be_drawn_are_said(replies, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_script("prepare_data").draw_alike([["What is it?", "A dog."]] * 9, replies, random.Random(0))


def test_a_study_trains_each_step_once_and_reports_what_was_asked(monkeypatch, tmp_path):
    study, stages, reports = load_script("study/train"), [], []

    def evaluate_file(folder, file, output, settings):
        reports.append((output.relative_to(tmp_path).as_posix(), settings.limit, settings.generation))
        output.write_text("{}")
        return {"metrics": {}}

    monkeypatch.setattr(study, "run_stage", lambda stage, recipe, _: stages.append((stage, SimpleNamespace(**recipe))))
    monkeypatch.setattr(study, "evaluate_file", evaluate_file)
    command = [
        *("train.py", "--config", ROOT / "configs" / "study.yaml", "--output", tmp_path, "--pairs", "p.tar"),
        *("--dialogues", "d.jsonl", "--steps", "vikdf", "soft_prompt", "--seeds", 3, "--evaluate", "x/chat.jsonl"),
    ]
    for further in (["--limit", 8], ["--limit", 4, "--whole", "--knowledge", "own"], ["--limit", 8]):
        monkeypatch.setattr(sys, "argv", [str(each) for each in [*command, *further]])
        study.main()
    assert [stage for stage, _ in stages] == ["distill", "integrate", "tune", "tune"]
    recipes = [recipe for _, recipe in stages]
    assert [recipe.training["seed"] for recipe in recipes] == [3, 3, 3, 3]
    assert recipes[2].model == {"checkpoint": str(tmp_path / "seed3" / "integrate")}
    assert recipes[2].data["pairs"] == "p.tar" and recipes[2].data["train"] == "d.jsonl"
    assert recipes[3].model["initial_gate"] == 0 and not hasattr(recipes[3], "objectives")
    assert "pairs" not in recipes[3].data
    assert reports == [
        ("seed3/vikdf/chat-own.json", 8, False),
        ("seed3/vikdf/chat-shuffled.json", 8, False),
        ("seed3/soft_prompt/chat-own.json", 8, False),
        ("seed3/soft_prompt/chat-shuffled.json", 8, False),
        ("seed3/vikdf/chat_replies-own.json", 4, True),
        ("seed3/soft_prompt/chat_replies-own.json", 4, True),
    ]


def test_a_step_of_preference_learns_from_the_pairs_that_are_named(monkeypatch, tmp_path, capsys):
    study, stages = load_script("study/train"), []
    monkeypatch.setattr(study, "run_stage", lambda stage, recipe, _: stages.append((stage, recipe)))
    command = ["train.py", "--config", ROOT / "configs" / "study.yaml", "--output", tmp_path, "--pairs", "p.tar"]
    command += ["--dialogues", "d.jsonl", "--steps", "preferred_soft_prompt"]
    monkeypatch.setattr(sys, "argv", [str(each) for each in command])
    with pytest.raises(SystemExit):
        study.main()
    assert not stages and "name them with --preferences" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--preferences", "best.jsonl"])
    study.main()
    assert [stage for stage, _ in stages] == ["tune", "prefer"]
    recipe = stages[1][1]
    assert recipe["model"] == {"checkpoint": str(tmp_path / "seed0" / "soft_prompt")}
    assert recipe["data"] == {"train": "best.jsonl", "dialogues": "d.jsonl"}
    rates = recipe["training"]["learning_rates"]
    assert {name for name, rate in rates.items() if rate} == {"knowledge_base"}


def test_a_step_shrinks_the_knowledge_of_its_parent(backbones, tmp_path):
    """By the mean of what the contexts of the training dialogues evoke."""
    study, parent = load_script("study/train"), tmp_path / "seed0" / "vikdf"
    model, processor = build_from(backbones, "qwen", "separate")
    processor.chat_template = CHATML_WITH_GENERATION
    nn.init.normal_(model.knowledge_gate)
    model.save_pretrained(parent)
    processor.save_pretrained(parent)
    (parent / "finished.json").write_text("{}")
    file = tmp_path / "talk.jsonl"
    turns = [["How are you?", "Well."], ["A dog on the beach.", "It swims.", "In the sea?", "Yes."]]
    file.write_text("".join(json.dumps({"turns": each}) + "\n" for each in turns))
    args = SimpleNamespace(config=ROOT / "configs" / "study.yaml", output=tmp_path, dialogues=str(file))
    folder = study.train("less", 0, {"less": {"parent": "vikdf", "shrink": 0.5}, "vikdf": {}}, args)
    before, after = (study.load_model(each)[0] for each in (parent, folder))
    mean = study.mean_knowledge(before, processor, list(study.load_dialogues(str(file))))
    knowledge = torch.randn(2, *mean.shape)
    expected = before.project_knowledge(mean + 0.5 * (knowledge - mean))
    torch.testing.assert_close(after.project_knowledge(knowledge), expected)


def write_dialogues(folder: Path, name: str, nlls: list[float], replies: list[str] | None = None) -> None:
    """A report of `vikdf evaluate` on dialogues with replies of two tokens, the second of a visual word."""
    records = []
    for i, nll in enumerate(nlls):
        record = {"key": f"d{i}", "nll": nll, "tokens": 2, "visual_nll": nll / 2, "visual_tokens": 1}
        if replies is not None:
            record |= {"reply": replies[i], "bleu": [2, 1, 0, 0, 0, 2, 1, 0, 0], "mrr": 0.5, "rouge_l": 0.25}
        records.append(record)
    metrics = {"nll": sum(nlls) / 2 / len(nlls), "nll_visual_words": sum(nlls) / 2 / len(nlls)}
    if replies is not None:
        metrics |= {"mrr": 0.5, "rouge_l": 0.25, "distinct_1": len(set(replies)) / len(replies)}
    report = {"data_sha256": "x", "seed": 0, "metrics": metrics, "num_dialogues": len(nlls), "dialogues": records}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(report | {"confidence_95": {"nll": [1, 2]}}))


def write_probe(folder: Path, knowledge: str, right: list[int]) -> None:
    records = []
    for i, each in enumerate(right):
        subsets = ["all", "text_nb_correct=false"] if i < 2 else ["all"]
        record = {"id": str(i), "cluster": str(i), "subsets": subsets, "choices": ["red", "blue"], "answer": 0}
        measures = {score: {"accuracy": float(each)} for score in ("raw", "pmi")}
        records.append(record | {"measures": {knowledge: measures}})
    folder.mkdir(parents=True, exist_ok=True)
    probe = {"task": "choice", "arms": [knowledge], "subsets": {}, "records": records}
    (folder / f"colours-{knowledge}.json").write_text(json.dumps(probe))


def test_dialogues(collector, tmp_path):
    study = tmp_path / "study"
    for seed, nlls in enumerate([[2, 4, 6, 8], [4, 4, 6, 8]]):
        write_dialogues(study / f"seed{seed}" / "vikdf", "chat-own.json", nlls, ["a b", "c d", "e f", "g h"])
    write_dialogues(study / "seed0" / "vikdf", "chat-shuffled.json", [4, 5, 7, 9])
    write_dialogues(study / "seed0" / "soft_prompt", "chat-own.json", [6, 6, 8, 10], ["a b"] * 4)
    write_dialogues(study / "seed0" / "language_model", "chat-none.json", [9, 9, 9, 9])
    write_dialogues(study / "seed0" / "soft_prompt", "other-own.json", [6, 6, 8, 10])
    found = collector.collect(study, "chat", "vikdf")
    assert list(found["arms"]) == ["language_model", "soft_prompt", "vikdf", "vikdf, shuffled"]
    assert found["arms"]["vikdf"]["metrics"]["nll"] == pytest.approx(21 / 8)  # mean of 20 / 8 and 22 / 8
    assert "confidence_95" not in found["arms"]["vikdf"] and found["arms"]["vikdf"]["seeds"] == 2
    assert found["arms"]["soft_prompt"]["confidence_95"] == {"nll": [1, 2]}
    differences = found["arms"]["soft_prompt"]["reference_minus_this"]
    assert differences["nll"]["difference"] == pytest.approx((20 - 30) / 8)  # of the seed that both have
    untrained = found["arms"]["language_model"]["reference_minus_this"]
    assert untrained["nll"]["difference"] == pytest.approx((21 - 36) / 8)  # which has no seed
    assert differences["distinct_1"]["difference"] == pytest.approx(7 / 7 - 1 / 4)  # "a" is an article
    some = collector.collect(study, "chat", "vikdf", ["vikdf", "soft_prompt"], "prompts")
    assert kind_of(some) == some["kind"] == "study"
    assert some["data"] == "chat_prompts" and list(some["arms"]) == ["soft_prompt", "vikdf", "vikdf, shuffled"]
    assert some["arms"]["soft_prompt"] == found["arms"]["soft_prompt"]
    with pytest.raises(ValueError, match="no report of 'paper' on 'chat'; it has those of .*soft_prompt"):
        collector.collect(study, "chat", "paper")

    likelihoods, replies = [part.splitlines() for part in collector.tables(found).split("\n\n") if part[0] == "|"]
    rows = ["| **vikdf**", "| vikdf, shuffled", "| soft_prompt", "| language_model"]
    assert [line.split(" | ")[0] for line in likelihoods[2:]] == rows
    assert likelihoods[2].startswith("| **vikdf** | 2 | 2.625 | 2.625 |")
    assert "| -1.2500 [-1." in likelihoods[4]
    assert replies[0] == "| arm | seeds | MRR | ROUGE-L | Distinct-1 |" and len(replies) == 4
    assert replies[3] == "| soft_prompt | 1 | 0.500 | 0.250 | 0.250 |"  # four dialogues prove nothing
    differences["distinct_1"] |= {"p_value_holm": 0.01}
    assert "| soft_prompt | 1 | 0.500 | 0.250 | 0.250 + |" in collector.tables(found)


def test_probes(collector, tmp_path):
    study = tmp_path / "study"
    for seed, right in enumerate([[1, 1, 0, 1], [1, 0, 0, 1]]):
        write_probe(study / f"seed{seed}" / "vikdf", "own", right)
        write_probe(study / f"seed{seed}" / "vikdf", "none", [0, 0, 0, 1])
    write_probe(study / "seed0" / "soft_prompt", "own", [0, 0, 0, 1])
    found = collector.collect(study, "colours", "vikdf")
    arm = found["arms"]["vikdf"]
    assert (arm["seeds"], arm["num_items"]) == (2, 4)
    assert arm["metrics"]["accuracy (raw)"] == 5 / 8 and arm["metrics"]["accuracy (raw), hard"] == 3 / 4
    difference = found["arms"]["vikdf, none"]["reference_minus_this"]["accuracy (pmi)"]
    assert difference["difference"] == 3 / 8 and {"confidence_95", "p_value"} < set(difference)
    of_one_seed = found["arms"]["soft_prompt"]["reference_minus_this"]["accuracy (pmi)"]
    assert of_one_seed["difference"] == 2 / 4  # to the seed that both have
    table = collector.tables(found).splitlines()
    assert table[0] == "colours, 4 items"
    assert table[4].startswith("| **vikdf** | 2 | 0.625 | 0.625 | 0.750 | 0.750 |")
    assert table[6].startswith("| vikdf, none | 2 | 0.250 | 0.250 | 0.000 | 0.000 | +0.3750 [+0.")


def test_what_is_rendered(collector, monkeypatch, tmp_path):
    study, readme = tmp_path / "study", tmp_path / "README.md"
    readme.write_text(f"Before\n{collector.BEGIN}\nold\n{collector.END}\nafter\n")
    write_dialogues(study / "seed0" / "vikdf", "chat-own.json", [2, 4])
    write_dialogues(study / "seed0" / "vikdf", "chat-shuffled.json", [4, 5])
    for knowledge in ("own", "none"):
        write_probe(study / "seed0" / "vikdf", knowledge, [1, 0, 0])
    for data in ("chat", "colours"):
        result = collector.collect(study, data, "vikdf")
        (collector.RESULTS / f"{data}.json").write_text(json.dumps(result))
    points = [{"queries": q, "context_tokens": t, "ratio": 1 + q / t} for t in (20, 1000) for q in (8, 4)]
    latency = {"latency": points, "new_tokens": 32, "threads": 2, "repeats": 5}
    (collector.RESULTS / "latency.json").write_text(json.dumps(latency))
    seconds = {"in_batches": 0.3, "one_at_a_time": 1.5}
    throughput = {"throughput": {"seconds_a_dialogue": seconds, "times_faster": 5.0}, "num_dialogues": 7}
    throughput |= {"data": "chat.jsonl", "batch_size": 16, "threads": 2}
    (collector.RESULTS / "throughput.json").write_text(json.dumps(throughput))
    step = {"aten_ops": 9560, "item": 0, "nonzero": 0}
    training = {"host_counts": {"step_with_cached_states": step, "step_over_parts": 1.044}}
    training["batch_4"] = {
        "pairs_per_s": {"cached": 22.04},
        "step_over_llm_ratio": 0.98,
        "peak_memory_gb": {"cached": 20.96},
    }
    replies = {"host_counts": {"ratios": {"aten_ops": 1.0018, "python_calls": 1.0178}}}
    replies["first_token"] = {"tokens_per_s": {"vikdf": 20.0}, "overhead_ratio": 1.2, "peak_memory_gb": 14.0}
    speed = {"speed": {"paper": {"training": training, "generation": replies}}, "device": "cuda"}
    (collector.RESULTS / "speed.json").write_text(json.dumps(speed))
    step = {"weights": 15.0, "peak": 34.13, "optimizer": 1.27}
    memory = {"memory": {"one_pass": {"batch_4": step | {"peak": 17.76}, "batch_32": step}}, "shapes": "paper"}
    memory["bytes_per_token_and_layer"] = {"eager": 131720.0, "torch_compile": 93320.0}
    (collector.RESULTS / "memory.json").write_text(json.dumps(memory))
    monkeypatch.setattr(collector, "HEADLINES", ("chat", "missing"))
    collector.render(readme)
    text, everything = readme.read_text(), (collector.RESULTS / "tables.md").read_text()
    assert text.startswith(f"Before\n{collector.BEGIN}\nchat, 2 dialogues")
    assert text.endswith(f"![chat](eval/results/chat.svg)\n{collector.END}\nafter\n")
    assert "old" not in text and "colours" not in text and "colours, 3 items" in everything
    assert "| queries | 20 | 1,000 |\n|---|---|---|\n| 4 | 1.20 | 1.00 |\n| 8 | 1.40 | 1.01 |" in everything
    assert "| in batches of 16 | 0.30 | 25 |\n| one at a time | 1.50 | 125 |\n\n5.0 times faster." in everything
    assert "| paper | 9,560 | 1.04 | 0 | 0 | 1.002 | 1.018 |" in everything
    assert "| | 4 | 32 |\n|---|---|---|\n| one_pass | 19.0 | 35.4 |" in everything
    assert "keeps of a token: 132 kB (eager), 93 kB (torch_compile)." in everything
    assert "| paper, step, batch_4 | 22.0 | 0.98 | 21.0 |" in everything
    assert "| paper, reply, first_token | 20.0 | 1.20 | 14.0 |" in everything
    plots = {path: path.read_bytes() for path in collector.RESULTS.glob("*.svg")}
    for data in ("chat", "colours"):
        assert f"![{data}]({data}.svg)" in everything
        assert "<svg" in (collector.RESULTS / f"{data}.svg").read_text()
    collector.render(readme)
    assert readme.read_text() == text and (collector.RESULTS / "tables.md").read_text() == everything
    assert {path: path.read_bytes() for path in collector.RESULTS.glob("*.svg")} == plots and len(plots) == 2
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="lacks the markers"):
        collector.render(readme)


def test_a_turn_that_a_photograph_replaced_is_the_reply_to_the_turns_before_it(tmp_path):
    grounded = load_script("analyses/grounded_replies")
    rows = [
        {"turns": ["a", "b", "c", "d", "e"], "replaced_index": 3, "image": "dog.jpg"},
        {"turns": ["a", "b", "c"], "replaced_index": 0, "image": "cat.jpg"},
        {"turns": ["a", "b", "c"], "replaced_index": 2, "image": "sea.jpg"},
    ]
    (tmp_path / "grounded.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dialogues, names = grounded.read_dialogues(tmp_path / "grounded.jsonl")
    turns = [[(message["role"], message["content"]) for message in each["messages"]] for each in dialogues]
    assert turns == [
        [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        [("assistant", "a"), ("user", "b"), ("assistant", "c")],
    ]
    assert [each["references"] for each in dialogues] == [["d"], ["c"]]
    assert names == ["dog", "sea"]


def test_the_time_of_an_evaluation_in_batches_and_one_at_a_time(backbones, monkeypatch, tmp_path):
    throughput = load_script("speed/throughput")
    model, reader = build_from(backbones, "qwen", "separate")
    reader.chat_template = CHATML_WITH_GENERATION
    for part in (model, reader):
        part.save_pretrained(tmp_path / "model")
    turns = [["hello there", "the red dog"], ["what is that", "a boat"], ["where is it", "in the sea"]]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"turns": each}) for each in turns))
    score, read = throughput.score_candidates, []

    def counting(*args):
        read.append(len(args[2]))
        return score(*args)

    monkeypatch.setattr(throughput, "score_candidates", counting)
    options = {"model": tmp_path / "model", "data": tmp_path / "chat.jsonl", "output": tmp_path / "times.json"}
    arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["throughput.py", *arguments])
    throughput.main()
    assert read == [1] * 5  # two to warm up
    report = json.loads((tmp_path / "times.json").read_text())
    seconds = report["throughput"]["seconds_a_dialogue"]
    assert report["num_dialogues"] == 3 and min(seconds.values()) > 0
    assert report["throughput"]["times_faster"] == pytest.approx(seconds["one_at_a_time"] / seconds["in_batches"])


def test_only_the_ends_of_lines_part_dialogues(tmp_path):
    path = tmp_path / "dialogues.jsonl"
    row = {"replaced_index": 1, "turns": ["Look!\u2028A dog.", "He is asleep."], "image": "dog.jpg"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    dialogues, names = load_script("analyses/grounded_replies").read_dialogues(path)
    assert dialogues[0]["messages"][0]["content"] == "Look!\u2028A dog." and names == ["dog"]
