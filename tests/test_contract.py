"""Tests that the documentation is true: its signatures, its fields, its defaults, and every line
of its code.

`docs/training-client.md` is the public contract. On this page and its neighbors

- a bare signature (`def name(...) -> Type`, perhaps with a decorator) must be the signature of the
  class that the page is about, and no public member may be missing;
- a `@dataclass` block must list the first fields of the class of that name, in order;
- every other Python block runs, page by page in document order, against a real embedded service
  with a tiny model. Only values of `model_ref` are replaced.

A block right after the comment `<!-- not run: why -->` is left out. Set `TG_TINKER_CONTRACT` to a
copy of the contract to check that each of its Python blocks is in our page word for word.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import tg_tinker
from support.models import make_model
from tg_tinker import (
    FutureHandle,
    LoRAConfig,
    NotFoundError,
    ServiceClient,
    TrainingClient,
    TrainingConfig,
)
from tg_tinker.demo.options import find_demo_model

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CONTRACT = DOCS / "training-client.md"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
SUBJECTS = {
    "training-client.md": TrainingClient,
    "service-client.md": ServiceClient,
    "futures.md": FutureHandle,
}
"""Page -> the class whose signatures it lists."""

CONTRACT_BLOCKS = 29
CONTRACT_SHA256 = "a009391be4ed99b29212e7e15a13090ba07aebbf8100f23da604c2d036cca2f5"
"""The first blocks of our page, joined by zero bytes: the contract's, to the letter."""

CONFIGS = [name for name in tg_tinker.__all__ if name.endswith("Config")]


class Block(NamedTuple):
    """A fenced Python block: its page, the line of its first code line, its text."""

    page: Path
    line: int
    code: str

    @property
    def is_signature(self) -> bool:
        return re.match(r"(@property\n)?def ", self.code) is not None and not self.compiles

    @property
    def is_dataclass(self) -> bool:
        return self.code.startswith("@dataclass")

    @property
    def compiles(self) -> bool:
        try:
            ast.parse(self.code)
        except SyntaxError:
            return False
        return True

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Returns all Python blocks of a page that are not marked as not run."""
    text = page.read_text()
    fence = re.compile(r"^(<!-- not run: .+? -->\n+)?```python\n(.*?)^```$", re.S | re.M)
    return [
        Block(page, text.count("\n", 0, found.start(2)) + 1, found[2])
        for found in fence.finditer(text)
        if found[1] is None
    ]


def signatures() -> list[Block]:
    return [b for page in PAGES for b in blocks(page) if b.is_signature]


def dataclass_blocks() -> list[Block]:
    return [b for page in PAGES for b in blocks(page) if b.is_dataclass]


def programs(page: Path) -> list[Block]:
    return [b for b in blocks(page) if not (b.is_signature or b.is_dataclass)]


# --- (a) signatures ----------------------------------------------------------------------------


def documented(block: Block) -> ast.FunctionDef:
    (function,) = ast.parse(block.code.rstrip() + ": ...").body
    assert isinstance(function, ast.FunctionDef)
    return function


def parameters_of(function: ast.FunctionDef) -> list[tuple[str, Any, str]]:
    """Returns (name, kind, default as code) in the order and words of `inspect.signature`."""
    empty: dict[str, object] = {}
    arguments = function.args
    for argument in [*arguments.args, *arguments.kwonlyargs, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    function.returns, function.decorator_list = None, []
    module = ast.fix_missing_locations(ast.Module([function], []))
    exec(compile(module, "signature", "exec"), empty)  # noqa: S102 - our own documentation
    return described(inspect.signature(empty[function.name]))


def is_complete(block: Block) -> bool:
    """Returns whether no later block of the page repeats the signature with more parameters.

    The contract's own blocks stay as they are, so a parameter that came later stands in another.
    """
    name = documented(block).name
    same = [b for b in blocks(block.page) if b.is_signature and documented(b).name == name]
    return block == same[-1]


def described(signature: inspect.Signature) -> list[tuple[str, Any, str]]:
    return [(p.name, p.kind, repr(p.default)) for p in signature.parameters.values()]


@pytest.mark.parametrize("block", signatures(), ids=str)
def test_signatures_are_those_of_the_class(block: Block) -> None:
    function = documented(block)
    subject = SUBJECTS[block.page.name]
    member = inspect.getattr_static(subject, function.name)
    if function.decorator_list:
        member = member if isinstance(member, property) else member.func  # a cached property
        member = member.fget if isinstance(member, property) else member
    assert inspect.isfunction(member), f"{function.name} is a property on one side only"
    listed, real = parameters_of(function), inspect.signature(member)
    if not is_complete(block):
        added = [*real.parameters.values()][len(listed) :]
        assert added
        assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in added)
        real = real.replace(parameters=[*real.parameters.values()][: len(listed)])
    assert parameters_of(documented(block)) == described(real)


@pytest.mark.parametrize("page", SUBJECTS)
def test_every_public_member_is_documented(page: str) -> None:
    listed = {documented(b).name for b in blocks(DOCS / page) if b.is_signature}
    classes = [c for c in SUBJECTS[page].__mro__ if c.__module__.startswith("tg_tinker")]
    public = {name for c in classes for name in vars(c) if not name.startswith("_")}
    assert public - listed == set()


# --- (b) dataclasses ---------------------------------------------------------------------------


@pytest.mark.parametrize("block", dataclass_blocks(), ids=str)
def test_dataclasses_begin_with_the_listed_fields_and_are_frozen(block: Block) -> None:
    (listed,) = ast.parse(block.code).body
    assert isinstance(listed, ast.ClassDef)
    names = [f.target.id for f in listed.body if isinstance(f, ast.AnnAssign)]
    real = getattr(tg_tinker, listed.name)
    assert [field.name for field in dataclasses.fields(real)][: len(names)] == names
    assert real.__dataclass_params__.frozen


def test_every_result_field_is_on_the_page() -> None:
    text = CONTRACT.read_text()
    for block in blocks(CONTRACT):
        if block.is_dataclass:
            name = re.search(r"class (\w+)", block.code)[1]
            section = text.partition(f"### {name}\n")[2].partition("\n##")[0]
            for field in dataclasses.fields(getattr(tg_tinker, name)):
                assert re.search(rf"\b{field.name}\b", section), f"{name}.{field.name}"


# --- what tables say ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_tables_have_every_field_with_its_default(name: str) -> None:
    section = (DOCS / "configuration.md").read_text().partition(f"## {name}\n")[2]
    rows = re.findall(
        r"^\| `(\w+)` \|.*?\| (?:`(.+?)`|required) \|", section.split("\n## ")[0], re.M
    )
    fields = getattr(tg_tinker, name).model_fields
    assert [row[0] for row in rows] == list(fields)
    for field, shown in rows:
        default = fields[field].get_default(call_default_factory=True)
        if fields[field].is_required():
            assert not shown, field
        elif shown.endswith("Config()"):
            assert default == getattr(tg_tinker, shown[:-2])(), field
        else:
            assert ast.literal_eval(shown) == default, field


def test_the_error_page_has_every_class_with_its_code() -> None:
    text = (DOCS / "errors.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+Error)` \| `(\w+)` \|", text, re.M))
    classes = {name: getattr(tg_tinker, name) for name in tg_tinker.__all__ if "Error" in name}
    root = classes.pop("TGTinkerError")
    assert rows == {name: cls.code for name, cls in classes.items()}
    assert f"`{root.code}`" in text
    above = [root]
    for indent, name in re.findall(r"^([│ ]*)[├└]── (\w+)", text, re.M):
        depth = len(indent) // 4 + 1
        assert classes.pop(name).__bases__[0] is above[depth - 1], name
        above[depth:] = [getattr(tg_tinker, name)]
    assert not classes


# --- links and paths ---------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Returns the fragments that a page offers, as GitHub and others make them of headings."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M), re.M
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, fragment = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not fragment or fragment in anchors(linked), target


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_each_page_begins_with_something_that_runs(page: Path) -> None:
    before, _, rest = page.read_text().partition("```")
    assert rest.startswith(("python\n", "sh\n")), rest[:30]
    assert "\n## " not in before
    assert len(before.splitlines()) <= 8


def test_the_index_has_one_line_for_each_page() -> None:
    lines = (DOCS / "index.md").read_text().splitlines()
    listed = [
        found[1] for line in lines if (found := re.match(r"- \[.+?\]\(([\w-]+\.md)\): .", line))
    ]
    assert sorted(listed) == sorted({page.name for page in DOCS.glob("*.md")} - {"index.md"})


def test_the_readme_is_short_and_its_program_too() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 120
    program = programs(readme)[0].code
    assert len([line for line in program.splitlines() if line]) <= 16


def test_no_page_names_a_web_address() -> None:
    for path in [*PAGES, *(ROOT / "examples").glob("*.py")]:
        assert not re.search(r"https?://(?!127\.0\.0\.1)", path.read_text()), path.name


# --- the contract, word for word ---------------------------------------------------------------


def test_the_contract_has_not_been_edited_or_reformatted() -> None:
    kept = "\0".join(block.code for block in blocks(CONTRACT)[:CONTRACT_BLOCKS])
    assert hashlib.sha256(kept.encode()).hexdigest() == CONTRACT_SHA256


def test_every_code_block_of_the_contract_stands_in_our_page() -> None:
    contract = os.environ.get("TG_TINKER_CONTRACT")
    if contract is None:
        pytest.skip("TG_TINKER_CONTRACT names no copy of the contract")
    text, at = CONTRACT.read_text(), 0
    wanted = blocks(Path(contract))
    assert wanted
    for block in wanted:
        found = text.find(f"```python\n{block.code}```", at)
        assert found >= 0, f"not found in this order: {block}"
        at = found + 1


# --- (c), (d) code that runs -------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the tiny model with room for `max_tokens=500`."""
    directory = tmp_path_factory.mktemp("long") / "model"
    return make_model(directory, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def tc(service: ServiceClient, long_model: Path) -> Iterator[TrainingClient]:
    """Yields the client of all pages except the contract, which makes its own."""
    config = TrainingConfig(model_ref=str(long_model), lora_config=LoRAConfig(rank=4))
    with service.create_training_client(config) as client:
        yield client


def batches(count: int) -> list[dict[str, list[list[int]]]]:
    """Returns padded rows as the contract's examples get them from a tokenizer."""
    draw = random.Random(count)
    made = []
    for _ in range(count):
        rows = [[draw.randrange(256) for _ in range(size)] for size in (9, 5)]
        made.append(
            {
                "input_ids": [rows[0], rows[1] + [0] * 4],
                "attention_mask": [[1] * 9, [1] * 5 + [0] * 4],
                "labels": [[-100] * 3 + rows[0][3:], rows[1] + [-100] * 4],
            }
        )
    return made


def with_model(code: str, model: Path) -> str:
    return re.sub(r"model_ref=(?:\"[^\"]*\"|str\(.*?\)\))", f"model_ref={str(model)!r}", code)


def run_page(page: Path, model: Path | None, **given: Any) -> dict[str, Any]:
    """Runs a page's blocks in one namespace, and closes the clients that it leaves open.

    `model` replaces every `model_ref`; None leaves them as they are.
    """
    names: dict[str, Any] = {"__name__": "__main__", **given}
    try:
        for block in programs(page):
            code = block.code if model is None else with_model(block.code, model)
            # Padded to its line in the page, so that a traceback points there.
            exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), names)  # noqa: S102
    finally:
        for value in names.values():
            if isinstance(value, TrainingClient | ServiceClient) and value not in given.values():
                value.close()
    return names


@pytest.mark.slow
def test_the_code_of_the_contract_runs(
    service: ServiceClient, long_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (first,) = batches(1)
    losses: list[float] = []
    names = run_page(
        CONTRACT,
        long_model,
        **first,
        train_loader=batches(3),
        val_loader=batches(2),
        val_losses=losses,
        batch=first,
    )
    assert names["config"].model_ref == str(long_model)
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)
    printed = capsys.readouterr().out
    for word in ("Loss: ", "Gradient norm: ", "Completion: ", "Artifact ID: art-", "Loaded step: "):
        assert word in printed
    for word in ("timed out", "Invalid batch", "API error"):
        assert word not in printed


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if p != CONTRACT], ids=lambda p: p.name)
def test_the_code_of_every_other_page_runs(
    page: Path, long_model: Path, tc: TrainingClient
) -> None:
    tc.train()
    run_page(page, long_model, tc=tc, batch=batches(1)[0])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_program_of_the_readme_teaches_the_real_model(
    service: ServiceClient, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is replaced here: the model is SmolLM2-135M from its GGUF file."""
    try:
        find_demo_model()
    except NotFoundError as error:
        pytest.skip(str(error))
    run_page(ROOT / "README.md", None)
    losses, answer, artifact = capsys.readouterr().out.splitlines()
    first, *_, last = ast.literal_eval(losses)
    assert last < 0.5 < first
    assert answer == "Behind the boiler, on a nail."
    assert artifact.startswith("art-")
