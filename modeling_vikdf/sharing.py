"""A model as a repository that others can load: what was saved, the code that reads it, its card; one commit.

    model, processor (or the folder they were saved in) -> a folder: weights, configuration, tokenizers, ...
                                                        -> code that transformers loads without this package
                                                        -> README.md
    the folder -> one commit on the Hub, or a local folder

This file is part of what it ships, so that a model loaded from the Hub can be pushed again. Models and processors use
it, so it only names their classes.
"""

import fnmatch
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, ProcessorMixin

from .atomic_saving import saved_in
from .configuration_vikdf import BACKBONE_CONFIGS, VikdfConfig


TASK = "vikdf-dialogue"
PIPELINE = "pipeline_vikdf.VikdfDialoguePipeline"
DIALOGUE_MODEL = "modeling_vikdf.VikdfForConditionalGeneration"
PRETRAINING_MODEL = "modeling_distillation.VikdfForPreTraining"
PROCESSOR = "processing_vikdf.VikdfProcessor"
AUTO_CLASSES = {
    "AutoConfig": "configuration_vikdf.VikdfConfig",
    "AutoModel": DIALOGUE_MODEL,
    "AutoModelForCausalLM": DIALOGUE_MODEL,
    "AutoModelForPreTraining": PRETRAINING_MODEL,
    "AutoProcessor": PROCESSOR,
}
# All code of a repository: these classes, and what they import.
SHIPPED = (
    "atomic_saving",
    "chats_vikdf",
    "configuration_vikdf",
    "modeling_candidates",
    "modeling_checkpointing",
    "modeling_compilation",
    "modeling_distillation",
    "modeling_generation",
    "modeling_iqformer",
    "modeling_objectives",
    "modeling_prefix",
    "modeling_pretrained",
    "modeling_saving",
    "modeling_vikdf",
    "pictures_vikdf",
    "pipeline_vikdf",
    "processing_vikdf",
    "sharing",
    "text_vikdf",
)
# Whoever loads one of the classes gets the code of all, and can save or push it again. transformers copies what a file
# imports, when it loads the file (`get_cached_module_file`) and when it saves an object (`custom_object_save`). It has
# no hook for further files, but reads the imports from the file's text: so these lines suffice. As statements they
# would be a circle, for what they name imports this file.
_COPIED_ALONG = """
    from .modeling_distillation import VikdfForPreTraining
    from .pipeline_vikdf import VikdfDialoguePipeline
    from .processing_vikdf import VikdfProcessor
"""
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
ADAPTER = ("adapter/*",)
# What a saved folder gives a repository, the processor aside. Training leaves optimizer states and pickles beside it.
MODEL_FILES = ("config.json", "generation_config.json", *WEIGHTS, *ADAPTER)
TRAINING_FILES = ("recipe.yaml", "trainer_state.json")


def push_to_hub(
    repo_id: str,
    *,
    model: PreTrainedModel | str | os.PathLike | None = None,
    processor: ProcessorMixin | None = None,
    include_backbones: bool = False,
    results: Iterable[str | os.PathLike] = (),
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload VIKDF model",
) -> CommitInfo:
    """
    Commits a model, its processor or both to a repository of the Hub, in one step.

    An interrupted push leaves the repository as it was; pushed again, what was already uploaded is not sent again.
    Weights of an earlier version that the new one does not replace are deleted in the same commit.

    Args:
        repo_id: "org/name", or a name in the namespace of the token's owner; created if it does not exist.
        model: see `write_repository`.
        processor: see `write_repository`.
        include_backbones: whether the weights of the frozen backbones are pushed, too.
        results: reports of `vikdf evaluate`, `retrieve` or `probe`, for the card and to go with it.
        private: whether a new repository is private; default what the organisation says.
        token: a token with write access; default the one that `hf auth login` stored.
        revision: branch to commit to, created if it does not exist; default `main`.
        create_pr: whether to open a pull request instead of committing.
        commit_message: of the commit, or the title of the pull request.

    Raises:
        OSError: if something cannot be read, or the Hub refuses or breaks off.
        ValueError: if `repo_id` cannot be one, or what is to be pushed would not load elsewhere.
    """
    api = HfApi(token=token)
    validate_repo_id(repo_id)
    if "/" not in repo_id:
        repo_id = f"{api.whoami()['name']}/{repo_id}"
    with tempfile.TemporaryDirectory() as folder:
        write_repository(
            folder,
            model=model,
            processor=processor,
            include_backbones=include_backbones,
            results=results,
            repo_id=repo_id,
        )
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not create_pr and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            paths = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
            operations = [CommitOperationAdd(name, path) for name, path in sorted(paths.items())]
            there = api.model_info(repo_id, revision=revision)
            if model is not None:
                names = {file.rfilename for file in there.siblings} - set(paths)
                stale = {name for pattern in (*WEIGHTS, *ADAPTER) for name in fnmatch.filter(names, pattern)}
                operations += [CommitOperationDelete(name) for name in sorted(stale)]
            return api.create_commit(
                repo_id,
                operations,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                parent_commit=there.sha,  # refused if somebody else commits meanwhile: two models would be mixed
            )
        except Exception as error:  # uploads fail in many ways, and under classes of several libraries
            # of an upload, huggingface_hub's own error only says which file it was
            why = f"{error} {error.__cause__}" if isinstance(error, RuntimeError) and error.__cause__ else error
            raise OSError(
                f"Pushing to {repo_id!r} failed: {why}\nThe commit is a single step, so the repository holds all of "
                "it or none. Correct what is wrong (is the token allowed to write there? `hf auth login`) and push "
                "again: what was uploaded is not sent again."
            ) from error


def export(
    model: str | os.PathLike,
    output: str | os.PathLike,
    include_backbones: bool = False,
    results: Iterable[str | os.PathLike] = (),
) -> None:
    """
    Writes the folder that `push_to_hub` would commit. It appears complete or not at all.

    Args:
        model: the folder or repository in which model and processor were saved.
        output: a folder that does not exist, or is empty.
        include_backbones: whether the weights of the frozen backbones are written, too.
        results: reports of `vikdf evaluate`, `retrieve` or `probe`, for the card and to go with it.

    Raises:
        OSError, ValueError: as `push_to_hub`; also if `output` holds something.
    """
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder. Name another --output, or remove it.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as aside:
        folder = Path(aside, output.name)
        folder.mkdir()  # with the usual permissions, which a temporary folder has not
        write_repository(folder, model=model, include_backbones=include_backbones, results=results)
        os.replace(folder, output)


def write_repository(
    folder: str | os.PathLike,
    *,
    model: PreTrainedModel | str | os.PathLike | None = None,
    processor: ProcessorMixin | None = None,
    include_backbones: bool = False,
    results: Iterable[str | os.PathLike] = (),
    repo_id: str | None = None,
) -> None:
    """
    Fills an empty folder with what a repository holds.

    Args:
        folder: where to write.
        model: a model, or the folder or repository in which model and processor were saved.
        processor: the processor that goes with the model; found beside a model that is given by its folder.
        include_backbones: whether the weights of the frozen backbones are written, too.
        results: reports of `vikdf evaluate`, `retrieve` or `probe`, for the card and to go with it.
        repo_id: the repository that this will be.

    Raises:
        OSError: if something cannot be read.
        ValueError: if it would not load elsewhere, or hold backbones without being asked to.
    """
    folder = Path(folder)
    if isinstance(model, (str, os.PathLike)):
        processor = processor or _load_class(PROCESSOR).from_pretrained(model)
        config = VikdfConfig.from_pretrained(model)
        if include_backbones and config.backbones:
            pretraining = PRETRAINING_MODEL.split(".")[1] in (config.architectures or [])
            model = _load_class(PRETRAINING_MODEL if pretraining else DIALOGUE_MODEL).from_pretrained(model)
        else:
            _check_backbones(config)
            patterns = [*MODEL_FILES, *TRAINING_FILES]
            source = model if os.path.isdir(model) else snapshot_download(model, allow_patterns=patterns)
            saved = Path(source, saved_in(source, "config.json"))
            for path in (path for pattern in MODEL_FILES for path in saved.glob(pattern)):
                target = folder / path.relative_to(saved)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
            for path in (path for name in TRAINING_FILES for path in Path(source).glob(name)):
                shutil.copyfile(path, folder / path.name)
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder, include_backbones=include_backbones)
        _check_backbones(VikdfConfig.from_pretrained(folder))
    if processor is not None:
        processor.save_pretrained(folder)
    if model is not None:
        _check_weights(folder, include_backbones)
    _add_code(folder)
    if model is not None:
        _add_card(folder, repo_id, results)


def _check_backbones(config: VikdfConfig) -> None:
    """Refuses a configuration whose backbones are folders of this machine."""
    for role, source in config.backbones.items():
        name = source["repo_id"]
        try:
            validate_repo_id(name)
            is_local = os.path.isdir(name)
        except HFValidationError:
            is_local = True
        if is_local:
            raise ValueError(
                f"The {role} is {name!r}, a folder of this machine, which others do not have. Push it to the Hub and "
                f"name its repository in config.backbones[{role!r}]['repo_id'], or share the backbones with the model "
                "(include_backbones=True, --include-backbones)."
            )


def _check_weights(folder: Path, include_backbones: bool) -> None:
    """Refuses weights that are missing, damaged, or a backbone's without being asked for."""
    paths = sorted(folder.glob("model*.safetensors"))
    index = folder / "model.safetensors.index.json"
    expected = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    if missing := sorted(expected - {path.name for path in paths}):
        raise OSError(f"There is no {', '.join(missing)} to share. Save the model with save_pretrained first.")
    for path in paths:
        try:
            with safe_open(path, framework="pt") as weights:
                names = list(weights.keys())
        except SafetensorError as error:
            raise OSError(f"{path.name} is truncated or damaged ({error}). Save or download it again.") from error
        frozen = next((name for name in names if name.split(".")[0] in BACKBONE_CONFIGS), None)
        # one that is stored while others are named was trained, or it would be named, too
        if frozen and not include_backbones and not VikdfConfig.from_pretrained(folder).backbones:
            raise ValueError(
                f"{path.name} holds frozen backbones ({frozen}, ...), which are shared only when asked for: "
                "include_backbones=True, --include-backbones."
            )


def _add_code(folder: Path) -> None:
    """The code that reads the checkpoint, and the entries by which transformers finds it."""
    for name in SHIPPED:
        shutil.copyfile(Path(__file__).with_name(f"{name}.py"), folder / f"{name}.py")
    pipeline = {"impl": PIPELINE, "pt": ["AutoModelForCausalLM"], "type": "text"}
    _edit_json(folder / "config.json", auto_map=AUTO_CLASSES, custom_pipelines={TASK: pipeline})
    _edit_json(folder / "processor_config.json", auto_map={"AutoProcessor": PROCESSOR})


def _load_class(name: str) -> Any:
    """A class of this package, or of the repository that this file was loaded from, by "module.Class"."""
    module, class_name = name.split(".")
    return getattr(importlib.import_module(f".{module}", __package__), class_name)


def _edit_json(path: Path, **entries: Any) -> None:
    if path.is_file():
        fields = json.loads(path.read_text(encoding="utf-8")) | entries
        path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _add_card(folder: Path, repo_id: str | None, results: Iterable[str | os.PathLike]) -> None:
    """README.md with its figure, and the reports that it was rendered from."""
    for path in map(Path, results):
        if (folder / path.name).exists():
            raise ValueError(f"The report {path} is called like a file of the model; give it another name.")
        shutil.copyfile(path, folder / path.name)
    try:
        # the installed package has the templates; code loaded from the Hub leaves a repository its card
        from modeling_vikdf.cards.render import FIGURE, render_model_card
    except ImportError:
        return
    (folder / "README.md").write_text(render_model_card(folder, repo_id), encoding="utf-8")
    shutil.copyfile(FIGURE, folder / FIGURE.name)


__all__ = ["export", "push_to_hub", "write_repository"]
