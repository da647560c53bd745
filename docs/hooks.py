"""MkDocs hook: the site has the repository's layout, so that links work in both.

Besides docs/ it shows files where they are in the repository: README, results, examples.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


SHOWN = (
    "README.md",
    "CHANGELOG.md",
    "docs/*.md",
    "eval/*.md",
    "eval/results/*.md",
    "eval/results/*.svg",
    "examples/*",
    "configs/**/*.yaml",
    "hub_cards/vikdf.svg",
    "modeling_vikdf/**/*.py",
    "spaces_demo/pictures/*.md",
    "spaces_demo/space.webp",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replaces the pages of docs/ by all files in `SHOWN`, each under its path in the repository."""
    root = Path(config.config_file_path).parent
    for file in files.documentation_pages():
        files.remove(file)
    for path in sorted(path for pattern in SHOWN for path in root.glob(pattern) if path.is_file()):
        files.append(File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)))
    return files
