"""The commands of `vikdf`. Each is a function that calls the package, with its options declared above it.

Knows options and messages; the work is done in the package, which a command imports only when it runs.
"""

import argparse
import importlib.metadata
import json
import os
import sys
from pathlib import Path

from .parsing import command, one_of, option


MODEL = option("--model", help="folder or Hub id of a VIKDF model (default: the packaged one)")


@command(
    "talk in the terminal",
    MODEL,
    option("--message", action="append", default=[], help="a user turn to answer; may be repeated"),
    option("--interactive", action="store_true", help="continue in the terminal after --message"),
    option("--no-knowledge", action="store_true", help="chat with the bare language model"),
    option("--max-new-tokens", type=int, default=64, help="longest reply in tokens (default: 64)"),
)
def chat(args: argparse.Namespace) -> None:
    """Talks in the terminal, or answers the given messages as successive user turns and exits."""
    from transformers import pipeline

    from modeling_vikdf import DEFAULT_CHECKPOINT
    from modeling_vikdf.building import load_model
    from modeling_vikdf.modeling_compilation import compiles_by_default
    from modeling_vikdf.terminal import Dialogue, answer_lines, answer_messages

    source = args.model or DEFAULT_CHECKPOINT
    # loaded here, because `pipeline` hides the cause of a failure behind its own error
    model, processor = load_model(source)
    if compile := compiles_by_default(model):
        print("Compiling, which takes a minute or two; replies are fast after that.", file=sys.stderr)
    pipe = pipeline("vikdf-dialogue", model=model, processor=processor, compile=compile)
    dialogue = Dialogue(pipe, use_knowledge=not args.no_knowledge, max_new_tokens=args.max_new_tokens)
    answer_messages(dialogue, args.message, echo=args.interactive)
    if not args.message or (args.interactive and sys.stdin.isatty()):
        answer_lines(dialogue)


@command(
    "build an untrained model around pretrained backbones",
    option("--language-model", required=True, help="folder or Hub id of a chat LLM"),
    option("--context-encoder", required=True, help="folder or Hub id of a text encoder"),
    option("--vision-encoder", help="folder or Hub id of a vision encoder"),
    option("--output", required=True, help="folder to write"),
    option("--num-knowledge-tokens", type=int, default=32, help="number of queries (default: 32)"),
    option("--layers", type=int, default=12, help="layers of the IQ-Former (default: 12)"),
    option("--width", type=int, default=768, help="width of the IQ-Former (default: 768)"),
    option("--heads", type=int, default=12, help="attention heads of the IQ-Former (default: 12)"),
    option("--system-prompt", help="system message of chats without one"),
    option("--base-text", help="start with silent knowledge: a neutral sentence in its place"),
)
def new(args: argparse.Namespace) -> None:
    """Builds an untrained model around pretrained backbones and writes model and processor to a folder."""
    from modeling_vikdf.building import new_model, short_greedy_replies

    model, processor = new_model(
        args.language_model,
        args.context_encoder,
        args.vision_encoder,
        num_knowledge_tokens=args.num_knowledge_tokens,
        system_prompt=args.system_prompt,
        iqformer_config={
            "num_hidden_layers": args.layers,
            "hidden_size": args.width,
            "intermediate_size": 4 * args.width,
            "num_attention_heads": args.heads,
            "cross_attention_frequency": 1,
        },
        base_text=args.base_text,
        project_inputs=True,
    )
    model.generation_config = short_greedy_replies(model.generation_config)
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"Wrote an untrained model with {trained / 1e6:.1f} M trainable parameters to {args.output}")


RECIPE = (
    option("--config", required=True, metavar="RECIPE", help="YAML file, or a recipe's name such as smollm2/distill"),
    option(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings that override the recipe's: learning_rate=1e-4, data.train=pairs.tar, model.checkpoint=DIR",
    ),
)


@command("learn from pairs of replies which of them people prefer", *RECIPE, name="prefer", extra="train")
@command("tune the knowledge on text dialogues", *RECIPE, name="tune", extra="train")
@command("stage 2: teach the LLM to use knowledge, on image-text pairs", *RECIPE, name="integrate", extra="train")
@command("stage 1: learn from image-text pairs which knowledge a text evokes", *RECIPE, name="distill", extra="train")
def train(args: argparse.Namespace) -> None:
    """Runs a training stage from a recipe, or resumes one that was interrupted."""
    from modeling_vikdf.training.recipe_files import read_recipe
    from modeling_vikdf.training.stages import run_stage

    metrics = run_stage(args.command, read_recipe(args.config, args.overrides))
    print(json.dumps(metrics, indent=2))


@command(
    "convert a checkpoint of the authors' code",
    option("checkpoint", help="folder with config.json and a safetensors file"),
    option("--output", required=True, help="folder to write"),
)
def convert(args: argparse.Namespace) -> None:
    """Converts a checkpoint of the authors' code to a self-contained VIKDF checkpoint."""
    from modeling_vikdf.conversion import convert_checkpoint

    convert_checkpoint(args.checkpoint).save_pretrained(args.output)
    print(f"Wrote {args.output}.")


def print_figures(figures: dict, output: str | None) -> None:
    """Prints figures as JSON, and writes them to a file if one is given."""
    text = json.dumps(figures, indent=2)
    print(text)
    if output:
        Path(output).write_text(text + "\n", encoding="utf-8")


@command(
    "fit a reward head to graded replies, by which the model then chooses among candidates",
    option("--model", required=True, help="folder or Hub id of a VIKDF model"),
    option("--grades", required=True, help='JSON Lines: {"turns": [...], "replies": [...], "grades": [...]}'),
    option("--layer", type=int, help="whose states the head reads (default: at three quarters of the LLM's depth)"),
    option("--num-candidates", type=int, default=8, help="replies to choose from (default: 8)"),
    option("--no-knowledge", action="store_true", help="fit to the bare language model's states, for a control"),
    option("--output", required=True, help="folder to write the model to"),
    extra="eval",
)
def reward(args: argparse.Namespace) -> None:
    """
    Fits a reward head to replies that readers graded, and saves a model that chooses among candidates by it.

    Refuses a head that does not choose better than chance in contexts it was not fitted to.
    """
    from modeling_vikdf.building import load_model
    from modeling_vikdf.training.rewarding import add_reward_head, fit_reward, load_graded, reply_states
    from modeling_vikdf.training.shrinking import save_stage

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)  # fails now, not after all the work
    examples = load_graded(args.grades)
    model, processor = load_model(args.model)
    layer = args.layer
    if layer is None:
        layer = 3 * model.config.text_config.num_hidden_layers // 4
    states = reply_states(model, processor, examples, layer, use_knowledge=not args.no_knowledge)
    fit = fit_reward(states, [example["grades"] for example in examples])
    weight = fit.pop("weight")
    print(json.dumps(fit, indent=2))
    if fit["gain_interval"][0] <= 0:
        raise ValueError(
            f"The reward chooses no better than chance (gain {fit['gain']:.2f}, 95 % interval from "
            f"{fit['gain_interval'][0]:.2f}): grade more contexts, or check that the grades belong to these replies."
        )
    add_reward_head(model, weight, layer)
    model.generation_config.num_candidates = args.num_candidates
    model.generation_config.candidate_weights = {"reward": 1.0}
    stage = {"layer": layer, "grades": Path(args.grades).name, "knowledge": not args.no_knowledge, **fit}
    save_stage("reward", model, processor, args.model, output, stage)


@command(
    "shrink a tuned model's knowledge towards its mean, as validation dialogues suggest",
    option("--model", required=True, help="folder or Hub id of a VIKDF model"),
    option("--data", required=True, help="dialogues, JSON Lines, to compute the mean from"),
    option("--validation", required=True, help="dialogues, JSON Lines, by whose replies' likelihood to choose"),
    option("--output", required=True, help="folder to write the model to"),
    extra="eval",
)
def shrink(args: argparse.Namespace) -> None:
    """
    Shrinks a tuned model's knowledge towards its mean if that makes validation replies significantly likelier.

    The share of the deviations from the mean that is kept is chosen on validation dialogues: 1 leaves the model as it
    is, 0 replaces knowledge by a constant.
    """
    from modeling_vikdf.building import load_model
    from modeling_vikdf.data import load_dialogues
    from modeling_vikdf.training.shrinking import (
        choose_share,
        mean_knowledge,
        require_dialogues,
        save_stage,
        score_shares,
    )

    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)  # fails now, not after all the work
    dialogues, validation = (list(load_dialogues(source)) for source in (args.data, args.validation))
    require_dialogues(len(dialogues), args.data)
    require_dialogues(len(validation), args.validation)
    model, processor = load_model(args.model)
    mean = mean_knowledge(model, processor, dialogues)
    choice = choose_share(score_shares(model, processor, validation, mean))
    model.shrink_knowledge(mean, choice["share"])
    data = {"train": Path(args.data).name, "validation": Path(args.validation).name}
    save_stage("shrink", model, processor, args.model, output, {"data": data, **choice})
    print(json.dumps(choice, indent=2))
    if choice["share"] == 0:
        low, high = choice["gain_interval"]
        print(
            "WARNING: share 0.0: knowledge no longer depends on the context. Whatever is said or shown, the LLM now "
            f"reads one constant, the mean, because it makes the {choice['dialogues']} validation replies likelier "
            f"by {choice['gain']:.3f} nats per token [{low:.3f}, {high:.3f}]. {args.model} is unchanged.",
            file=sys.stderr,
        )
    elif choice["share"] == 1:
        print(
            "WARNING: no smaller share makes the validation replies likelier by a gain clear of zero, so nothing is "
            f"shrunk: share 1.0. {output} holds the unchanged model.",
            file=sys.stderr,
        )


@command(
    "measure text-image retrieval",
    option("--data", required=True, nargs="+", help="webdataset shards, image folders or Hub datasets"),
    option("--model", required=True, help="folder or Hub id of a VIKDF model with a vision encoder"),
    option("--output", help="JSON file to write"),
    option("--batch-size", type=int, default=64, help="pictures per batch (default: 64)"),
    option("--seed", type=int, default=0, help="seed of the bootstrap intervals (default: 0)"),
    extra="eval",
)
def retrieve(args: argparse.Namespace) -> None:
    """Measures how often the matching head retrieves a caption's picture, and one of a picture's captions."""
    from modeling_vikdf.building import load_model
    from modeling_vikdf.data import SkipReport, load_image_text_pairs
    from modeling_vikdf.evaluation.retrieval import evaluate_retrieval

    report = SkipReport()
    pairs = load_image_text_pairs(args.data, shuffle_buffer=0, report=report)
    model, processor = load_model(args.model)
    figures = evaluate_retrieval(model, processor, pairs, batch_size=args.batch_size, seed=args.seed)
    figures["skipped"] = report.counts()
    print_figures(figures, args.output)
    print(report.summary(), file=sys.stderr)


@command(
    "embed pictures for the Space to compare knowledge with",
    option("source", help="folder of pictures, webdataset shards, Hub dataset; or an index, to embed again"),
    option("--output", required=True, help="folder to write index.safetensors to"),
    MODEL,
    extra="demo",
)
def index(args: argparse.Namespace) -> None:
    """Embeds pictures, or the thumbnails of an existing index, and writes a picture index."""
    from modeling_vikdf import DEFAULT_CHECKPOINT
    from modeling_vikdf.building import load_model
    from modeling_vikdf.data.sources import SkipReport
    from modeling_vikdf.picture_index import INDEX_NAME, PictureIndex, load_notes, load_pictures

    source, report = args.model or DEFAULT_CHECKPOINT, SkipReport()
    Path(args.output).mkdir(parents=True, exist_ok=True)  # fails now, not after all the work
    old = PictureIndex.load(args.source) if Path(args.source, INDEX_NAME).exists() else None
    pictures, total = load_pictures(args.source, report) if old is None else (None, None)
    model, processor = load_model(source)
    if old is None:
        new = PictureIndex.build(model, processor, pictures, total=total, notes=load_notes(args.source, report))
    else:
        new = old.rebuild(model, processor)
    path = new.save(args.output)
    print(f"Wrote {len(new)} pictures to {path}")
    print(report.summary(), file=sys.stderr)


@command(
    "measure replies to dialogues: likelihood, ranking, generation",
    option("--data", required=True, help="dialogues, JSON Lines: turns, messages, or turns and references"),
    option("--output", required=True, help="JSON file to write; an interrupted run is resumed"),
    MODEL,
    one_of(
        option("--baseline", choices=["language-model"], help="the same language model without knowledge"),
        option(
            "--knowledge",
            choices=["own", "shuffled", "mean"],
            default="own",
            help="the dialogue's own knowledge, another's, or the mean (default: own)",
        ),
    ),
    option("--system-prompt", help="system message of chats without one (default: the model's)"),
    option("--limit", type=int, help="number of dialogues to evaluate (default: all)"),
    option(
        "--references", choices=["first", "all"], default="first", help="whose perplexity to measure (default: first)"
    ),
    option("--no-ranking", action="store_true", help="skip the ranking among other replies"),
    option("--no-generation", action="store_true", help="skip the generation of replies"),
    option("--visual-words", help="file with one word per line, whose likelihood is reported separately"),
    option("--word-vectors", help="file with 'word v1 v2 ...' per line, for the embedding metrics"),
    option("--batch-size", type=int, default=16, help="dialogues, or usual candidates, per batch (default: 16)"),
    option("--seed", type=int, default=0, help="seed of distractors, shuffling, intervals (default: 0)"),
    extra="eval",
)
def evaluate(args: argparse.Namespace) -> None:
    """Evaluates replies to dialogues: their likelihood, their rank among others, and the model's own replies."""
    from modeling_vikdf import DEFAULT_CHECKPOINT
    from modeling_vikdf.evaluation.dialogues import EvaluationSettings, evaluate_file

    settings = EvaluationSettings(
        knowledge="none" if args.baseline else args.knowledge,
        system_prompt=args.system_prompt,
        limit=args.limit,
        all_references=args.references == "all",
        ranking=not args.no_ranking,
        generation=not args.no_generation,
        visual_words=args.visual_words,
        word_vectors=args.word_vectors,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    report = evaluate_file(args.model or DEFAULT_CHECKPOINT, args.data, args.output, settings)
    names = ("num_dialogues", "skipped", "metrics", "confidence_95")
    print(json.dumps({name: report[name] for name in names}, indent=2))


@command(
    "compare two evaluated systems by paired differences",
    option("reports", nargs="*", metavar="REPORT", help="two JSON files that evaluate wrote, A and B"),
    option("--a", nargs="+", metavar="A", help="instead: reports of A, one per training seed"),
    option("--b", nargs="+", metavar="B", help="and of B"),
    option("--output", help="JSON file to write"),
    option("--seed", type=int, default=0, help="seed of intervals and p-values (default: 0)"),
    extra="eval",
)
def compare(args: argparse.Namespace) -> None:
    """Reports the paired differences of two systems that `evaluate` measured on the same data."""
    from modeling_vikdf.evaluation.reports import compare as compare_reports

    if len(args.reports) == 2 and not (args.a or args.b):
        a, b = args.reports[:1], args.reports[1:]
    elif not args.reports and args.a and args.b:
        a, b = args.a, args.b
    else:
        raise ValueError("compare takes two reports, or the reports of several seeds: --a A1 A2 ... --b B1 B2 ...")
    print_figures(compare_reports(a, b, seed=args.seed), args.output)


@command(
    "probe what things look like, with and without knowledge",
    option("--data", required=True, help="items, JSON Lines; see modeling_vikdf/evaluation/probe_items.py"),
    option("--output", required=True, help="JSON file to write, with the scores of every item"),
    MODEL,
    option(
        "--arms",
        nargs="+",
        choices=["own", "shuffled", "mean", "none"],
        default=["own", "shuffled", "mean", "none"],
        help="the item's own knowledge, another's, the mean, or the bare language model (default: all)",
    ),
    option("--against", help="JSON file that this command wrote for another model on the same items"),
    option("--templates", help="JSON file of questions that replace the built-in ones"),
    option("--limit", type=int, help="number of items (default: all)"),
    option("--batch-size", type=int, default=32, help="prompts per batch (default: 32)"),
    option("--seed", type=int, default=0, help="seed of shuffled knowledge and statistics (default: 0)"),
    extra="eval",
)
def probe(args: argparse.Namespace) -> None:
    """Probes what things look like, with and without knowledge; prints a summary and writes every item's scores."""
    from modeling_vikdf import DEFAULT_CHECKPOINT
    from modeling_vikdf.building import load_model
    from modeling_vikdf.evaluation.probe_items import load_items
    from modeling_vikdf.evaluation.probes import compare_probes, probe

    templates, against = (
        json.loads(Path(name).read_text(encoding="utf-8")) if name else None for name in (args.templates, args.against)
    )
    items = load_items(args.data, templates, args.limit)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)  # fails now, not after all the work
    source = args.model or DEFAULT_CHECKPOINT
    model, processor = load_model(source)
    figures = probe(model, processor, items, args.arms, batch_size=args.batch_size, seed=args.seed)
    output.write_text(json.dumps(figures) + "\n", encoding="utf-8")  # kept even if the comparison fails
    if against is not None:
        figures["against"] = compare_probes(figures, against, args.seed)
        output.write_text(json.dumps(figures) + "\n", encoding="utf-8")
    summary = {key: figures[key] for key in ("task", "subsets", "against") if key in figures}
    print(json.dumps(summary, indent=2))


SHARED = (
    MODEL,
    option("--include-backbones", action="store_true", help="with the weights of the frozen backbones"),
    option("--results", nargs="+", default=[], help="reports of evaluate, retrieve and probe for the card"),
)


@command(
    "write a folder that is a complete Hub repository",
    option("--output", required=True, help="folder to write; must not exist, or be empty"),
    *SHARED,
)
def export(args: argparse.Namespace) -> None:
    """Writes a folder that is a complete Hub repository."""
    from modeling_vikdf import DEFAULT_CHECKPOINT
    from modeling_vikdf.backbones import require_model
    from modeling_vikdf.sharing import export

    source = args.model or DEFAULT_CHECKPOINT
    require_model(source)
    export(source, args.output, args.include_backbones, args.results)
    print(f"Wrote {args.output}")


@command(
    "commit a model to the Hub",
    option("--repo-id", required=True, help="ORG/NAME; created if it does not exist"),
    option("--private", action="store_true", help="make a new repository private"),
    option("--create-pr", action="store_true", help="open a pull request instead of committing"),
    option("--revision", help="branch to commit to (default: main)"),
    *SHARED,
)
def push(args: argparse.Namespace) -> None:
    """Commits a model to the Hub, with the token of `hf auth login` or the environment."""
    from modeling_vikdf import DEFAULT_CHECKPOINT
    from modeling_vikdf.backbones import require_model
    from modeling_vikdf.sharing import push_to_hub

    source = args.model or DEFAULT_CHECKPOINT
    require_model(source)
    commit = push_to_hub(
        args.repo_id,
        model=source,
        include_backbones=args.include_backbones,
        results=args.results,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
    )
    print(commit.pr_url or commit.commit_url)


@command(
    "measure speed and memory",
    option("what", choices=["generation", "training"], help="replies compared with the bare LLM's, or training steps"),
    MODEL,
    option("--output", help="JSON file to write"),
    option("--repeats", type=int, default=7, help="timed runs of each arm (default: 7)"),
    option("--shapes", choices=["small", "paper"], help="random models with a 135M or a 7b LLM, in place of --model"),
    option("--device", choices=["cuda", "cpu"], help="for --shapes: a GPU is timed, on a CPU operations are counted"),
    extra="train",  # only measuring training needs it
)
def benchmark(args: argparse.Namespace) -> None:
    """Measures speed and memory, as ratios where figures depend on the machine."""
    from modeling_vikdf.benchmark import benchmark_generation, benchmark_training
    from modeling_vikdf.benchmark_shapes import benchmark_shapes, choose_device

    if args.device and not args.shapes:
        raise ValueError("--device says where random models run: pass --shapes, too.")
    if args.shapes and args.model:
        raise ValueError("--shapes asks for random models, and --model for one: pass either.")
    if args.shapes:
        figures = benchmark_shapes(args.what, args.shapes, args.device or choose_device(), repeats=args.repeats)
    elif args.what == "generation":
        figures = benchmark_generation(args.model, repeats=args.repeats)
    else:
        figures = benchmark_training(repeats=args.repeats)
    print_figures(figures, args.output)


@command(
    "answer over HTTP, as OpenAI's chat API does",
    MODEL,
    option("--host", default="127.0.0.1", help="address to listen on (default: this machine only)"),
    option("--port", type=int, default=8000, help="port to listen on (default: 8000)"),
    option("--api-key", help="key that clients must send (default: environment variable VIKDF_API_KEY)"),
    option("--engine-url", help="vLLM that runs the language model, see docs/serving.md (default: it runs here)"),
    option("--engine-api-key", help="key that it requires (default: environment variable VIKDF_ENGINE_API_KEY)"),
    option("--max-batch", type=int, default=16, help="replies generated together (default: 16)"),
    option(
        "--max-batch-tokens",
        type=int,
        help="tokens of prompts and replies, times beams, processed together (default: the window, at least 16384)",
    ),
    option("--max-queue", type=int, default=64, help="waiting requests before others get 429 (default: 64)"),
    option(
        "--max-client-requests",
        type=int,
        default=32,
        help="open requests of an address before others get 429; four times as many are read a second (default: 32)",
    ),
    option("--timeout", type=float, default=60, help="seconds for an answer (default: 60)"),
    option(
        "--allow-origin",
        dest="allow_origins",
        nargs="+",
        default=(),
        metavar="ORIGIN",
        help="origins whose web pages may use the server, as in https://example.org; * for all (default: none)",
    ),
    extra="serve",
)
def serve(args: argparse.Namespace) -> None:
    """Answers over HTTP, as OpenAI's chat API does, until the process is terminated."""
    from modeling_vikdf.server.app import serve

    key = os.environ.get("VIKDF_API_KEY") if args.api_key is None else args.api_key
    if args.engine_api_key is not None and args.engine_url is None:
        raise ValueError("--engine-api-key is for the engine at --engine-url: give that, too.")
    engine_key = os.environ.get("VIKDF_ENGINE_API_KEY") if args.engine_api_key is None else args.engine_api_key
    limits = ("max_batch", "max_batch_tokens", "max_queue", "max_client_requests", "timeout")
    settings = {name: getattr(args, name) for name in (*limits, "allow_origins", "engine_url")}
    serve(args.model, args.host, args.port, key, engine_api_key=engine_key, **settings)


@command("print the version of the package")
def version(args: argparse.Namespace) -> None:
    """Prints the installed version."""
    print(importlib.metadata.version("modeling_vikdf"))


@command("print what a bug report needs: versions, hardware, where the backbones are")
def env(args: argparse.Namespace) -> None:
    """Prints versions, hardware and where the backbones are. No secrets: no token, no key, no home folder's name."""
    from modeling_vikdf.environment import describe_environment

    for name, value in describe_environment().items():
        print(f"{name}: {value}")
