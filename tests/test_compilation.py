"""Compiled decoding: the eager tokens, in all ways to decode, from few graphs; and where it cannot be had."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
from conftest import build_from, load_script
from PIL import Image
from tiny_training import ALL, arguments, dialogues, logged_losses, make_trainer, pairs
from torch._dynamo.utils import counters
from transformers import CompileConfig, GenerationConfig, MaxLengthCriteria, pipeline

from modeling_vikdf.modeling_compilation import (
    KEPT_TOKENS,
    SHORTEST,
    StaticCaches,
    compile_config_for,
    compile_layers,
    compiles_by_default,
    next_size,
    warm_up,
)
from modeling_vikdf.training.rewarding import add_reward_head


WORDS = (
    "What is your dog doing? I went to the beach yesterday and the water was so blue! It is snowing outside.".split()
)
# how the graphs are run does not change which ones there are
EAGER = CompileConfig(backend="eager", mode=None)


def chat(words: int) -> list[dict]:
    return [{"role": "user", "content": " ".join((WORDS * 9)[:words])}]


@pytest.fixture(scope="module")
def parts(backbones):
    model, processor = build_from(backbones, "llama", "separate", dtype=torch.float32)
    model.generation_config = GenerationConfig(
        eos_token_id=2, pad_token_id=0, do_sample=True, max_new_tokens=8, top_k=0
    )
    model.generation_config.num_candidates = 3
    model.generation_config.candidate_weights = {"reward": 1.0, "match": 1.0, "length": 0.5}
    add_reward_head(model, torch.randn(48, generator=torch.Generator().manual_seed(0)), 1)
    model.attach_vision_encoder()
    return model, processor


@pytest.fixture(scope="module")
def compiled(parts):
    """The arguments of compiled decoding, after a warm-up."""
    torch.compiler.reset()
    config = compile_config_for(parts[0], EAGER)
    warm_up(*parts, [1, 2, 4], config)
    return {"cache_implementation": "static", "compile_config": config}


GREEDY, SAMPLED = {"do_sample": False, "num_candidates": 1}, {"do_sample": True, "num_candidates": 1}
WAYS = [
    GREEDY,
    SAMPLED,
    {"num_candidates": 3},
    {"num_candidates": 4, "num_return_sequences": 2, "candidate_weights": {"likelihood": 1.0, "alone": -0.5}},
    {**SAMPLED, "num_return_sequences": 3, "output_logits": True, "return_dict_in_generate": True},
    {**GREEDY, "max_new_tokens": 300, "repetition_penalty": 1.3},
    {**GREEDY, "max_new_tokens": None, "max_length": 400},
]


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: ",".join(map(str, way)))
def test_the_tokens_are_those_of_eager_decoding(parts, compiled, way, rows):
    model, processor = parts
    chats = [chat(words) for words in (5, 60, 23)[:rows]]
    for how in ({}, {"use_knowledge": False}, {"images": [Image.new("RGB", (32, 32), "red"), None, None][:rows]}):
        inputs = processor(chats, **how)
        limit = {"stopping_criteria": [MaxLengthCriteria(inputs["input_ids"].shape[1] + 8)]}
        outputs = []
        for decoding in ({}, compiled):
            torch.manual_seed(rows)
            outputs.append(model.generate(**inputs, **way, **limit, **decoding, processor=processor))
        if "return_dict_in_generate" in way:
            logits = (torch.stack(output.logits) for output in outputs)
            torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
            outputs = [output.sequences for output in outputs]
        assert torch.equal(*outputs)


def test_after_the_warm_up_nothing_is_compiled(parts, compiled):
    model, processor = parts
    known = counters["stats"]["unique_graphs"]
    assert known and not counters["graph_break"]
    for rows, words, new_tokens in [
        (1, 3, 8),
        (1, 200, 8),
        (2, 9, 300),
        (3, 120, 4),
        (4, 40, 100),
        (7, 7, 7),
        (9, 3, 3),
    ]:
        for way in (GREEDY, {"num_candidates": 3}):
            inputs = processor([chat(words)] * rows)
            limit = [MaxLengthCriteria(inputs["input_ids"].shape[1] + 3)]
            limits = {"max_new_tokens": new_tokens, "stopping_criteria": limit}
            model.generate(**inputs, **way, **limits, **compiled, processor=processor)
    assert counters["stats"]["unique_graphs"] == known <= 6


def test_warming_up_leaves_the_random_numbers_alone(parts, compiled):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    warm_up(*parts, [1], compiled["compile_config"])
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("mode", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}], ids=str)
def test_beams_on_a_static_cache_are_those_on_a_growing_one(parts, compiled, mode):
    model, processor = parts
    inputs = processor([chat(5), chat(30)])
    assert torch.equal(
        model.generate(**inputs, **GREEDY, **mode, **compiled), model.generate(**inputs, **GREEDY, **mode)
    )


def test_a_cache_is_kept_for_the_next_prompts_and_not_returned(parts, compiled):
    model, processor = parts
    inputs = processor([chat(9)] * 2)

    def keys() -> set[int]:
        how = {**GREEDY, **compiled, "return_dict_in_generate": True}
        outputs = model.generate(**inputs, **how)
        assert not {"cache", "past_key_values"} & {*outputs}
        with model.static_caches.borrow(model.language_model, 2, SHORTEST) as cache:
            return {layer.keys.data_ptr() for layer in cache.layers}

    assert keys() == keys()


def test_caches_of_one_size_are_not_shared_and_few_are_kept(parts):
    language_model, caches = parts[0].language_model, StaticCaches()
    with caches.borrow(language_model, 2, 256) as one, caches.borrow(language_model, 2, 256) as other:
        assert one is not other
    with caches.borrow(language_model, 2, 256) as again:
        assert again is one
    with caches.borrow(language_model, 1, 2 * KEPT_TOKENS) as large:
        pass
    with caches.borrow(language_model, 2, 256) as new, caches.borrow(language_model, 1, 2 * KEPT_TOKENS) as kept:
        assert new is not one and kept is large


@pytest.mark.parametrize(
    "size, smallest, expected", [(1, 1, 1), (5, 1, 8), (8, 1, 8), (3, 256, 256), (513, 256, 1024)]
)
def test_sizes_are_rounded_up(size, smallest, expected):
    assert next_size(size, smallest) == expected


def test_what_cannot_be_compiled_is_refused(parts, monkeypatch):
    model, _ = parts
    assert compile_config_for(model, False) is None
    monkeypatch.setattr(type(model.language_model), "_can_compile_fullgraph", False)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot be compiled"):
        compile_config_for(model, True)


# ---- in the pipeline ----


@pytest.fixture(scope="module")
def pipes(parts):
    """Two pipelines, of which one compiles, built as a user would."""
    settings = {"model": parts[0], "processor": parts[1], "return_full_text": False}
    return pipeline("vikdf-dialogue", **settings), pipeline("vikdf-dialogue", compile=EAGER, **settings)


CALLS = [
    {},
    {"num_candidates": 1},
    {"num_candidates": 1, "use_knowledge": False},
    {"do_sample": False, "num_candidates": 1, "stop_sequence": "a"},
    {"do_sample": False, "num_candidates": 1, "num_beams": 3},
    {"do_sample": False, "num_candidates": 1, "prompt_lookup_num_tokens": 3},
    {"do_sample": False, "num_candidates": 1, "use_cache": False},
    {"do_sample": False, "num_candidates": 1, "cache_implementation": "dynamic"},
]


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_a_compiling_pipeline_replies_as_another(pipes, call):
    replies = []
    for pipe in pipes:
        torch.manual_seed(1)
        rows = 1 if "prompt_lookup_num_tokens" in call else 3  # which transformers has for single rows only
        one, several = pipe(chat(5), **call), pipe([chat(5), chat(40), chat(9)], batch_size=rows, **call)
        shown = pipe(chat(5), images=Image.new("RGB", (32, 32), "red"), **call)
        replies.append((one, several, shown))
    assert replies[0] == replies[1]


def test_a_compiling_pipeline_streams_the_same_pieces(pipes):
    for how in (GREEDY, {}):
        pieces = []
        for pipe in pipes:
            torch.manual_seed(2)
            pieces.append(list(pipe.stream(chat(5), **how)))
        assert pieces[0] == pieces[1] != []


def test_one_thread_decodes_all_replies_of_a_compiling_pipeline(pipes):
    """What CUDA records belongs to the thread that recorded it."""
    threads = set()
    read = pipes[1].model.language_model.register_forward_pre_hook(lambda *_: threads.add(threading.get_ident()))
    try:
        pipes[1](chat(3))
        list(pipes[1].stream(chat(3)))
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(pipes[1], [chat(3), chat(9)]))
    finally:
        read.remove()
    assert len(threads) == 1 and threads != {threading.get_ident()}


def test_a_stream_that_is_closed_leaves_the_thread_to_the_next(pipes):
    stream = pipes[1].stream(chat(3), **GREEDY, max_new_tokens=400)
    next(stream)
    stream.close()
    assert pipes[1](chat(3), **GREEDY) == pipes[0](chat(3), **GREEDY)


def test_an_interrupt_ends_the_generation(pipes, monkeypatch):
    steps, monkeyed = [], pipes[1].model.generate

    def generate(**kwargs):
        steps.append(kwargs["stopping_criteria"])
        return monkeyed(**kwargs)

    monkeypatch.setattr(pipes[1].model, "generate", generate)
    monkeypatch.setattr(Future, "result", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pipes[1](chat(3), **GREEDY)
    monkeypatch.undo()
    pipes[1](chat(3), **GREEDY)  # behind the other in the queue
    assert steps[0](torch.ones(1, 1, dtype=torch.long), None).all()


# ---- in the server ----


def ask(client, **settings) -> tuple[str, dict]:
    body = {"model": "vikdf", "messages": chat(9), "max_tokens": 6, **settings}
    answer = client.post("/v1/chat/completions", json=body).json()
    return answer["choices"][0]["message"]["content"], answer["usage"]


def test_a_compiling_server_answers_as_another(parts, compiled):
    pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
    from fastapi.testclient import TestClient

    from modeling_vikdf.server.app import create_app

    answers = []
    with TestClient(create_app(*parts)) as plain, TestClient(create_app(*parts, compile=EAGER, max_batch=2)) as fast:
        known = counters["stats"]["unique_graphs"]
        for client in (plain, fast):
            hows = (
                {"temperature": 0},
                {"seed": 1},
                {"seed": 2, "num_candidates": 1},
                {"num_beams": 2, "temperature": 0},
            )
            answers.append([ask(client, use_knowledge=use, **how) for how in hows for use in (True, False)])
            with ThreadPoolExecutor(5) as pool:
                answers[-1] += pool.map(lambda client: ask(client, temperature=0), [client] * 5)
    assert answers[0] == answers[1] and answers[0][0][1]["completion_tokens"] > 1
    assert counters["stats"]["unique_graphs"] == known


def test_a_server_that_cannot_compile_answers_all_the_same(parts, caplog):
    pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
    from fastapi.testclient import TestClient

    from modeling_vikdf.server.app import create_app

    def backend(graph, inputs):
        raise RuntimeError("no compiler here")

    broken = CompileConfig(backend=backend, mode=None)
    with TestClient(create_app(*parts)) as plain, TestClient(create_app(*parts, compile=broken, max_batch=1)) as other:
        assert ask(plain, temperature=0) == ask(other, temperature=0)
    assert "could not be compiled" in caplog.text


@pytest.mark.parametrize("device, compiles", [("cpu", False), ("cuda", True)])
def test_commands_compile_on_cuda_alone(parts, device, compiles, monkeypatch):
    monkeypatch.setattr(type(parts[0]), "device", torch.device(device))
    assert compiles_by_default(parts[0]) == compiles
    monkeypatch.setattr(parts[0].language_model, "hf_device_map", {"model": 0, "lm_head": "cpu"}, raising=False)
    assert not compiles_by_default(parts[0])


# ---- in training ----


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("objectives", [ALL, None], ids=["pairs", "dialogues"])
def test_compiled_layers_train_as_others(objectives, checkpointing, tmp_path):
    torch.compiler.reset()
    counters.clear()
    losses, layers = [], []
    for how in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"}):
        evaluation = dialogues(3) if objectives is None else pairs(3)
        settings = {"gradient_checkpointing": checkpointing, "evaluation": evaluation, "max_steps": 3}
        trainer = make_trainer(tmp_path, objectives, **settings, **how)
        trainer.train()
        losses.append([entry["loss"] for entry in logged_losses(trainer)] + [trainer.evaluate()["eval_loss"]])
        layers.append({name for name, _ in trainer.model.named_parameters()})
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and len(losses[0]) == 4
    assert layers[0] == layers[1]  # nothing is wrapped, so checkpoints are the same
    # both layers share their graphs: with gradient and without, of one size and of any
    assert 0 < counters["stats"]["unique_graphs"] <= 8


def test_an_llm_without_layers_to_compile_is_refused():
    with pytest.raises(ValueError, match="Linear has no layers"):
        compile_layers(torch.nn.Linear(2, 2), backend="eager")


def test_adamw_is_fused_unless_a_recipe_says_otherwise(tmp_path):
    assert arguments(tmp_path).optim == "adamw_torch_fused"
    trainer = make_trainer(tmp_path, None)
    trainer.train()
    assert trainer.optimizer.param_groups[0]["fused"]


# ---- measured ----


def test_decoding_is_measured_against_the_bare_llm():
    gpu = load_script("speed/gpu")
    llm = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    iqformer = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shapes = {"text_config": {**llm, "num_attention_heads": 2}, "iqformer_config": iqformer}
    model = gpu.build_model(shapes, "cpu", torch.float32)
    figures = gpu.measure(model, 3, new_tokens=4, repeats=1, compile=EAGER)
    assert set(figures["tokens_per_s"]) == {"vikdf", "llm", "vikdf_compiled", "llm_compiled"}
    assert figures["tokens_per_s"]["vikdf"] == pytest.approx(12 / figures["seconds"]["vikdf"])
    assert all(figures[name] > 0 for name in ("overhead", "overhead_compiled", "first_token_overhead"))
