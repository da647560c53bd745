"""Probes: items from lines, likelihoods of choices, scores under the arms of knowledge, and what is made of them."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import build_from
from tiny_training import dialogue_model, processor

from modeling_vikdf.cli import main
from modeling_vikdf.evaluation import probes
from modeling_vikdf.evaluation.arms import KNOWLEDGE_ARMS
from modeling_vikdf.evaluation.probe_items import Question, load_items
from modeling_vikdf.evaluation.probes import (
    average_probes,
    choice_log_likelihoods,
    compare_probes,
    probe,
    rank_correlation,
)
from modeling_vikdf.evaluation.reports import kind_of


PAIR = {"id": "p0", "task": "pair", "relation": "unsaid", "image": "1.jpg", "category": "thing"}
PAIR |= {"context": "A dog runs .", "choices": ["ball", "red umbrella"], "answer": 0, "text_nb_correct": False}
CHOICE = {"id": "c0", "task": "choice", "relation": "color", "descriptor": "ripe", "subject": "banana"}
CHOICE |= {"choices": ["red", "yellow"], "answer": 1, "flickr8k_subject": 3, "flickr8k_subject_and_gold": 0}
DIST = {"id": "d0", "task": "dist", "relation": "color", "subject": "sky", "choices": ["red", "blue", "white"]}
DIST |= {"answer": 1, "dist": [0.0, 0.75, 0.25], "group": "multi", "flickr8k_subject": 0}
RANK = {"id": "r0", "context": ["Hi.", "Hello!", "How was the beach?"], "positives": ["Sunny.", "It rained."]}
RANK |= {"adversarial": ["Repeated", "Repeated"], "random": ["Two people walk.", "A car."]}


@pytest.fixture
def write(tmp_path):
    """Writes items as JSON Lines."""

    def write(*items: dict, name: str = "items.jsonl") -> Path:
        (tmp_path / name).write_text("".join(json.dumps(item) + "\n" for item in items))
        return tmp_path / name

    return write


# ---- items ----


def test_a_caption_is_asked_about_and_its_reply_begins_as_its_category_wants(write):
    thing, action = load_items(write(PAIR, PAIR | {"id": "p1", "category": "action"}))
    question = "I have a photo. A dog runs . What else can be seen in it?"
    beginnings = ("In the photo there is also a", "The photo also shows the", "")
    assert thing.questions == [Question((("user", question),), beginnings)]
    assert action.questions == [Question((("user", question),), ("Somebody in the photo is", ""))]
    assert thing.unconditional[0].chat[0][1] == "I have a photo. ... What else can be seen in it?"
    assert thing.evoking.messages == [{"role": "user", "content": "A dog runs ."}]
    assert thing.cluster == "1.jpg"
    assert thing.subsets == ["all", "relation=unsaid", "category=thing", "text_nb_correct=false"]


def test_a_subject_stands_with_its_article_and_without_a_subject_it_is_it(write):
    item, stated = load_items(write(CHOICE, CHOICE | {"id": "c1", "flickr8k_subject_and_gold": 1}))
    assert item.questions[0].chat == (("user", "What color is the ripe banana?"),)
    assert item.questions[0].beginnings[:2] == ("The color of the ripe banana is", "The ripe banana is usually")
    assert item.unconditional[0].beginnings[:2] == ("The color of it is", "It is usually")
    assert item.evoking.chat == (("user", "The ripe banana"),)
    assert (item.cluster, item.subsets[-1], stated.subsets[-1]) == ("banana", "seen, not stated", "stated")


def test_templates_of_a_file(write):
    templates = {
        "color": {"cloze": ["Most X are", "X is"], "k_text": ["a photo of X", "X"]},
        "unsaid": {"cloze": ["CONTEXT It shows", "CONTEXT (thing) There is a"], "k_text": ["CONTEXT"]},
    }
    (item,) = load_items(write(DIST | {"plural": "skies"}), templates)
    # no chat template: the text that evokes the knowledge is what the user says, and no reply is a choice alone
    assert item.questions == [Question((("user", "A photo of the sky"),), ("Most skies are", "The sky is"))]
    (item,) = load_items(write(PAIR), templates)
    assert item.questions == [Question((("user", "A dog runs ."),), ("There is a",))]


def test_replies_to_rank(write):
    (item,) = load_items(write(RANK))
    assert [role for role, _ in item.questions[0].chat] == ["user", "assistant", "user"]
    assert item.questions == [item.evoking] and item.questions[0].beginnings == ("",)
    assert item.choices == ("Sunny.", "It rained.", "Two people walk.", "A car.")  # without what is missing


def test_limit(write):
    path = write(PAIR, PAIR | {"id": "p1"}, {"broken": 1})
    assert [item.fields["id"] for item in load_items(path, limit=2)] == ["p0", "p1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "essay"}, "unknown task 'essay'"),
        ({"task": None}, "unknown task None"),
        ({"answer": 2}, "'answer' is 2, but there are 2 choices"),
        ({"answer": -1}, "'answer' is -1"),
        ({"answer": "ball"}, "'answer' must be of type int"),
        ({"context": ""}, "'context' must be of type str and not empty"),
        ({"choices": ["ball", " "]}, "'choices' must be two or more words"),
        ({"choices": ["ball"]}, "'choices' must be two or more words"),
        ({"relation": "smell"}, "no templates for the relation 'smell'"),
        ({"relation": "color"}, "mentions X, which the item does not have"),
        ({"id": "p0"}, "the id 'p0' is already used on line 1"),
        (CHOICE, "task 'choice' after 'pair'"),
        (DIST | {"dist": [0.5, 0.5]}, "'dist' must have a share"),
        (DIST | {"dist": [0.0, 0.0, 0.0]}, "'dist' must have a share"),
        (RANK | {"task": "rank", "positives": ["fine", 3]}, "'positives' must be a list of texts"),
    ],
)
def test_an_item_that_is_wrong_is_named_by_its_line(write, change, message):
    path = write(PAIR, PAIR | {"id": "p1"} | change)
    with pytest.raises(ValueError, match="items.jsonl, line 2: ") as error:
        load_items(path)
    assert message in str(error.value)


def test_files_without_items(write, tmp_path):
    with pytest.raises(ValueError, match="no items"):
        load_items(write())
    (tmp_path / "broken.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="broken.jsonl, line 1: "):
        load_items(tmp_path / "broken.jsonl")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="line 1: expected a JSON object"):
        load_items(tmp_path / "list.jsonl")
    with pytest.raises(ValueError, match="line 1: the templates of the relation 'color' need"):
        load_items(write(CHOICE), {"color": {"k_text": ["X"]}})


# ---- likelihoods ----


def brute_force(model, reader, question: Question, beginning: str, choice: str, knowledge) -> tuple[float, int]:
    """One reply at a time, by the processor's labels and a forward pass over everything."""
    prompt = reader(question.messages, use_knowledge=knowledge is not None)["input_ids"].shape[1]

    def read(reply: str) -> tuple[torch.Tensor, list[int]]:
        """Ids of the chat with this reply, and where the reply's are, without its end of turn: Llama's is " </s>"."""
        chat = [*question.messages, {"role": "assistant", "content": reply}]
        inputs = reader(chat, return_labels=True, use_knowledge=knowledge is not None)
        spoken = [t for t, label in enumerate(inputs["labels"][0]) if label != -100 and t >= prompt]
        return inputs["input_ids"], spoken[: -2 if reader.tokenizer.eos_token == "</s>" else -1]

    before = len(read(beginning)[1]) if beginning else 0
    ids, spoken = read(f"{beginning} {choice}" if beginning else choice)
    with torch.no_grad():
        logits = model(input_ids=ids, knowledge=None if knowledge is None else knowledge[None]).logits[0]
    log_p = logits.double().log_softmax(-1)
    return sum(log_p[t - 1, ids[0, t]].item() for t in spoken[before:]), len(spoken) - before


@pytest.fixture(scope="module", params=["qwen", "llama"])
def tiny(request):
    reader = processor(request.param)
    return dialogue_model(llm=request.param, knowledge_token_id=reader.knowledge_token_id).eval(), reader


QUESTIONS = [
    Question((("user", "a dog on the beach"),), ("in the rain", "on", "")),
    Question((("user", "a"),), ("", "two people walk with red umbrellas")),
    Question((("user", "red"), ("assistant", "blue mountains"), ("user", "a dog runs")), ("the",)),
    Question((("user", "b"),), ("",)),
]
CHOICES = [
    ("red", "blue mountains", "rain"),
    ("dog", "people"),
    ("red umbrellas under mountains", "red", "runs"),
    ("a",),
]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_likelihoods_are_those_of_one_reply_at_a_time(tiny, batch_size):
    model, reader = tiny
    knowledge = [*torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(0)), None]
    questions, choices = QUESTIONS + QUESTIONS[:1], CHOICES + CHOICES[:1]
    knowledge.append(None)  # the first question once more, to the bare LLM
    results = choice_log_likelihoods(model, reader, questions, choices, knowledge, batch_size, progress=False)
    assert len(results) == 5 and not torch.allclose(results[0][0], results[4][0])
    for question, words, vectors, (log_p, tokens) in zip(questions, choices, knowledge, results, strict=True):
        expected = [[brute_force(model, reader, question, b, c, vectors) for c in words] for b in question.beginnings]
        torch.testing.assert_close(log_p.double(), torch.tensor(expected).double()[..., 0], atol=1e-5, rtol=1e-5)
        assert tokens.tolist() == [[count for _, count in row] for row in expected]
        assert (tokens > 0).all() and (log_p < 0).all()


def test_one_choice_of_one_token_reads_nothing_but_the_prompt(tiny):
    model, reader = tiny
    ((log_p, tokens),) = choice_log_likelihoods(model, reader, QUESTIONS[3:], [("a",)], [None], progress=False)
    assert log_p.shape == tokens.shape == (1, 1) and tokens.item() == 1
    ids = reader(QUESTIONS[3].messages, use_knowledge=False)["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0, -1].log_softmax(-1)
    reply = reader(
        [*QUESTIONS[3].messages, {"role": "assistant", "content": "a"}], return_labels=True, use_knowledge=False
    )
    assert math.isclose(log_p.item(), expected[reply["input_ids"][0, ids.shape[1]]].item(), abs_tol=1e-5)


def test_a_model_in_training_goes_on_training(tiny):
    model, reader = tiny
    model.train()
    choice_log_likelihoods(model, reader, QUESTIONS[3:], [("a",)], [None], progress=False)
    assert model.training
    model.eval()


def test_a_template_that_writes_replies_in_another_way(tiny, monkeypatch):
    model, reader = tiny
    monkeypatch.setattr(reader, "locate_tokens", lambda chat, **kwargs: ("something else", [5, 6], [(0, 9), (9, 14)]))
    with pytest.raises(ValueError, match="tokens cannot be identified"):
        choice_log_likelihoods(model, reader, QUESTIONS[3:], [("a",)], [None], progress=False)


# ---- scores and measures, by hand ----


@pytest.fixture
def by_hand(monkeypatch):
    """
    A probe whose likelihoods come from a function of (question, choice, knowledge) -> nats and number of tokens;
    item i evokes the knowledge [[i]].
    """

    def run(items, log_p, **kwargs):
        def likelihoods(model, processor, questions, choices, knowledge, batch_size, progress):
            return [
                (
                    torch.tensor([[log_p(q, word, k)[0] for word in words]] * len(q.beginnings)),
                    torch.tensor([[log_p(q, word, k)[1] for word in words]] * len(q.beginnings)),
                )
                for q, words, k in zip(questions, choices, knowledge, strict=True)
            ]

        monkeypatch.setattr(probes, "choice_log_likelihoods", likelihoods)
        monkeypatch.setattr(
            probes, "_evoke", lambda model, processor, chats, size: torch.arange(len(chats))[:, None, None].float()
        )
        return probe(None, None, items, **kwargs)

    return run


def test_scores_accuracy_and_differences(write, by_hand):
    subjects = {"sky": ("a", 1), "grass": ("a", 0), "snow": ("b", 1)}  # group, answer
    items = load_items(
        write(
            *(
                {
                    **CHOICE,
                    "id": s,
                    "descriptor": "",
                    "subject": s,
                    "choices": ["red", "blue"],
                    "group": g,
                    "answer": a,
                }
                for s, (g, a) in subjects.items()
            )
        )
    )

    def log_p(question, word, k):
        if "it?" in question.chat[0][1]:  # without subject
            assert k is None or k.item() == 1.0  # the mean of 0, 1, 2
            return (-1.0 if word == "red" else -5.0), 1
        if k is None:
            return (-2.0 if word == "red" else -4.0), 1  # raw: red; pmi: -1 against 1, blue
        own = question.chat[0][1] == f"What color is the {list(subjects)[int(k.item())]}?"
        right = word == ["red", "blue"][list(subjects.values())[int(k.item())][1]]
        return (-1.0 if right and own else -3.0), 1  # raw: right with one's own, else tied; the mean is grass's own

    result = by_hand(items, log_p)
    everything = result["subsets"]["all"]
    assert kind_of(result) == result["kind"] == "probe"
    assert result["task"] == "choice" and result["arms"] == list(KNOWLEDGE_ARMS)
    assert (everything["items"], everything["chance"]) == (3, 0.5)
    assert everything["majority"] == pytest.approx(2 / 3)
    accuracy = {
        arm: [everything["arms"][arm][score]["accuracy"]["mean"] for score in ("raw", "pmi")] for arm in KNOWLEDGE_ARMS
    }
    assert accuracy["own"] == pytest.approx([1, 2 / 3])  # grass: red is -1 - -1 = 0, blue is -3 - -5 = 2
    assert accuracy["shuffled"] == pytest.approx([0, 2 / 3])  # ties are wrong
    assert accuracy["mean"] == pytest.approx([1 / 3, 2 / 3])
    assert accuracy["none"] == pytest.approx([1 / 3, 2 / 3])
    difference = everything["own_minus"]["shuffled"]["raw"]["accuracy"]
    assert (difference["mean"], difference["confidence_95"]) == (1, [1, 1])
    assert 0.2 < difference["p_value"] < 0.3  # 2 of 8 assignments of signs
    assert result["subsets"]["group=b"]["items"] == 1 and result["subsets"]["group=a"]["majority"] == 0.5
    assert "relation=color" not in result["subsets"]  # which is everything
    record = result["records"][1]
    assert (record["id"], record["cluster"], record["choices"], record["answer"]) == (
        "grass",
        "grass",
        ["red", "blue"],
        0,
    )
    assert record["scores"]["own"] == {"raw": [-1, -3], "pmi": [0, 2]}
    assert record["measures"]["own"] == {"raw": {"accuracy": 1}, "pmi": {"accuracy": 0}}


def test_distributions(write, by_hand):
    shares = torch.tensor([1e-9, 0.75, 0.25])
    result = by_hand(
        load_items(write(DIST)), lambda q, word, k: (math.log(shares[DIST["choices"].index(word)]), 1), arms=["none"]
    )
    measures = result["records"][0]["measures"]["none"]
    assert measures["raw"]["accuracy"] == 1
    assert measures["raw"]["spearman"] == pytest.approx(1)
    assert measures["raw"]["kl"] == pytest.approx(0, abs=1e-6)
    # pmi: nothing but zeros, for the question without subject gives the same
    assert measures["pmi"]["accuracy"] == 0 and measures["pmi"]["spearman"] is None
    assert measures["pmi"]["kl"] == pytest.approx(0.75 * math.log(0.75 * 3) + 0.25 * math.log(0.25 * 3))
    assert "own_minus" not in result["subsets"]["all"]
    assert "NaN" not in json.dumps(result["records"])


def test_rank_correlation():
    assert rank_correlation(torch.tensor([1.0, 2, 3, 4]), torch.tensor([1.0, 3, 2, 4])) == pytest.approx(0.8)
    # ranks 1.5, 1.5, 3 and 1, 2, 3: 1.5 / sqrt(1.5 * 2)
    assert rank_correlation(torch.tensor([0.0, 0, 1]), torch.tensor([0.0, 1, 2])) == pytest.approx(1.5 / 3**0.5)
    assert rank_correlation(torch.zeros(3), torch.arange(3.0)) is None


def test_replies_are_ranked_by_their_mean_likelihood_a_token(write, by_hand):
    # a token: -1 and -3, random -2 and -4, adversarial ones missing; in sum the first would be last
    table = {"Sunny.": (-10.0, 10), "It rained.": (-6.0, 2), "Two people walk.": (-4.0, 2), "A car.": (-8.0, 2)}
    items = load_items(write(RANK, RANK | {"id": "r1", "adversarial": ["Repeated", "A car."]}))
    result = by_hand(
        items, lambda q, word, k: table[word] if len(q.chat) == 3 else (-table[word][1], table[word][1]), arms=["none"]
    )
    first, second = (record["measures"]["none"] for record in result["records"])
    assert first["raw"]["hits_at_1_random"] == 0.5 and first["raw"]["mrr_random"] == 0.75
    assert first["raw"]["hits_at_1_adversarial"] is None and second["raw"]["hits_at_1_adversarial"] == 1
    assert first["pmi"] == first["raw"]  # all alike without the dialogue
    means = result["subsets"]["all"]["arms"]["none"]["raw"]
    assert means["hits_at_1_adversarial"] == {"mean": 1, "confidence_95": [1, 1]}
    assert "majority" not in result["subsets"]["all"]


def test_shuffled_knowledge_is_another_photographs(write, by_hand):
    images = ["1.jpg", "1.jpg", "2.jpg", "2.jpg", "3.jpg"]
    lines = ({**PAIR, "id": str(i), "image": images[i], "context": f"Caption {i} ."} for i in range(5))
    given = {}

    def log_p(question, word, k):
        if "..." not in question.chat[0][1]:
            given[int(question.chat[0][1].split()[5])] = int(k.item())  # "I have a photo. Caption 3 . What ..."
        return -1.0, 1

    result = by_hand(load_items(write(*lines)), log_p, arms=["shuffled"])
    assert sorted(given) == sorted(given.values()) == list(range(5))
    assert all(images[source] != images[item] for item, source in given.items())
    assert [record["cluster"] for record in result["records"]] == images
    with pytest.raises(ValueError, match="shuffle"):
        by_hand(load_items(write(PAIR, PAIR | {"id": "p1"})), log_p, arms=["shuffled"])


def test_items_of_one_cluster_give_no_interval(write, by_hand):
    lines = [PAIR | {"id": str(i), "answer": i % 2, "image": image} for i, image in enumerate("aabb")]
    result = by_hand(load_items(write(*lines)), lambda q, word, k: (-1.0 * (word != "ball"), 1), arms=["none"])
    # each photograph has one right and one wrong answer, so whichever are drawn, half are right
    assert result["subsets"]["all"]["arms"]["none"]["raw"]["accuracy"] == {"mean": 0.5, "confidence_95": [0.5, 0.5]}


def test_unknown_arms(write, by_hand):
    for arms in (["own", "best"], []):
        with pytest.raises(ValueError, match="arms must be some of own, shuffled, mean, none"):
            by_hand(load_items(write(PAIR)), None, arms=arms)


# ---- one model against another ----


def outcome(*right: int, task: str = "choice") -> dict:
    """What `probe` would return for items that were right (1) or wrong (0)."""
    measures = [{score: {"accuracy": float(each)} for score in ("raw", "pmi")} for each in right]
    records = [
        {
            "id": str(i),
            "cluster": str(i),
            "subsets": ["all", f"group={i % 2}"],
            "choices": ["red", "blue"],
            "answer": 0,
        }
        | {"measures": {"own": each}}
        for i, each in enumerate(measures)
    ]
    return {"task": task, "records": records}


def test_models_are_compared_item_by_item():
    a, b = outcome(1, 1, 0, 1), outcome(0, 1, 0, 0)
    b["records"].reverse()
    compared = compare_probes(a, b)
    assert compared["all"]["raw"]["accuracy"]["mean"] == 0.5
    assert compared["group=0"]["pmi"]["accuracy"]["mean"] == 0.5
    low, high = compared["all"]["raw"]["accuracy"]["confidence_95"]
    assert low == 0 and high == 1
    assert 0.4 < compared["all"]["raw"]["accuracy"]["p_value"] < 0.6  # signs of two differences: 2 of 4


def test_trainings_are_averaged_item_by_item():
    a, b = outcome(1, 1, 0, 1), outcome(0, 1, 0, 0)
    for record in (*a["records"], *b["records"]):
        record["measures"]["none"] = record["measures"].pop("own")
    b["records"].reverse()
    mean = average_probes([a, b], "none")
    assert mean["subsets"]["all"]["arms"]["own"]["raw"]["accuracy"]["mean"] == 0.5
    assert [each["measures"]["own"]["pmi"]["accuracy"] for each in mean["records"]] == [0.5, 1, 0, 0.5]
    assert compare_probes(mean, outcome(0, 0, 0, 0))["group=1"]["raw"]["accuracy"]["mean"] == 0.75
    a["records"][0]["measures"]["none"]["raw"]["accuracy"] = None  # what one cannot tell is not told
    assert average_probes([a, b], "none")["records"][0]["measures"]["own"]["raw"] == {"accuracy": None}
    with pytest.raises(ValueError, match="arm 'shuffled'"):
        average_probes([a, b], "shuffled")


def test_what_cannot_be_compared():
    def altered(**change) -> dict:
        other = outcome(1, 0)
        other["records"][1] |= change
        return other

    for other in (outcome(1), outcome(1, 0, task="dist"), altered(id="x")):
        with pytest.raises(ValueError, match="do not have the same items"):
            compare_probes(outcome(1, 0), other)
    with pytest.raises(ValueError, match="item '1' does not have the same choices"):
        compare_probes(outcome(1, 0), altered(answer=1))
    with pytest.raises(ValueError, match="arm 'own'"):
        compare_probes(outcome(1, 0), altered(measures={"none": {}}))
    with pytest.raises(ValueError, match="no records"):
        compare_probes(outcome(1, 0), {"loss": 1})


# ---- the command ----


@pytest.fixture(scope="module")
def checkpoint(backbones, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    model, reader = build_from(backbones, "qwen", "separate")
    model.save_pretrained(folder)
    reader.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("item", [PAIR, CHOICE, DIST, RANK], ids=["pair", "choice", "dist", "rank"])
def test_command(checkpoint, write, tmp_path, capsys, item):
    words = ["my dog", "the blue sky", "a snowman in the park", "pizza"]
    lines = [item | {"id": word, "subject": word, "image": word, "context": word} for word in words]
    if item is RANK:
        lines = [item | {"id": word, "context": [word]} for word in words]
    data, output = write(*lines), tmp_path / "probe.json"
    common = ["probe", "--model", str(checkpoint), "--data", str(data), "--output", str(output)]
    main([*common, "--limit", "3", "--batch-size", "2"])
    printed, written = json.loads(capsys.readouterr().out), json.loads(output.read_text())
    assert printed == {key: written[key] for key in ("task", "subsets")}
    assert len(written["records"]) == written["subsets"]["all"]["items"] == 3
    assert set(written["subsets"]["all"]["own_minus"]) == {"shuffled", "mean", "none"}
    scores = written["records"][0]["scores"]
    assert scores["own"]["raw"] != scores["shuffled"]["raw"] != scores["none"]["raw"] != scores["mean"]["raw"]

    main([*common, "--limit", "3", "--arms", "own", "none", "--against", str(output)])
    printed = capsys.readouterr().out
    assert "NaN" not in printed
    differences = [each["mean"] for each in json.loads(printed)["against"]["all"]["raw"].values()]
    assert differences == pytest.approx([0] * len(differences), abs=1e-5)


def test_command_with_templates_of_its_own(checkpoint, write, tmp_path, capsys):
    templates, output = tmp_path / "templates.json", tmp_path / "probe.json"
    templates.write_text(json.dumps({"note": "short", "color": {"cloze": ["X is"], "k_text": ["X"]}}))
    common = ["probe", "--model", str(checkpoint), "--templates", str(templates), "--output", str(output)]
    main([*common, "--data", str(write(CHOICE)), "--arms", "none"])
    assert json.loads(output.read_text())["arms"] == ["none"]
    with pytest.raises(SystemExit, match="vikdf: .*line 1: no templates for the relation 'unsaid'"):
        main([*common, "--data", str(write(PAIR))])
