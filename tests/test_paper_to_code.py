"""docs/paper_to_code.md: what it names exists, and says which part of the paper it is. pytest
tests/test_paper_to_code.py"""
import ast, re

from conftest import ROOT

PAGE = ROOT / "docs/paper_to_code.md"
PARTS = ["Section 2.1", "Section 2.2", "Eq. 1", "Eq. 2", "Eq. 3", "Eq. 4", "Section 3.1", "Table 1",
         "Table 2", "Table 3", "Figure 1", "Figure 2", "Figures 3 to 5", "Appendix A.1",
         "Appendix A.2"]


def tables_of(page):
    """The tables of a page -> for each a list of rows, a row is a list of cells. Without headers"""
    tables = []
    before = ""
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("|---"):
            tables.append([])
        elif line.startswith("|") and before.startswith("|"):
            tables[-1].append([cell.strip() for cell in line.strip("|").split(" | ")])
        before = line
    return tables


def names_in(cell):
    """`ppo.py`: gae, whiten; `edit.py` -> [("ppo.py", "gae"), ("ppo.py", "whiten"), ("edit.py",
    None)]"""
    found = []
    for part in cell.split(";"):
        match = re.fullmatch(r"\s*`([\w/]+\.py)`(?:: (.+))?", part)
        assert match, f"{PAGE.name}: cannot read {cell!r}"
        path, names = match.groups()
        if names is None:
            found.append((path, None))
        else:
            found += [(path, name.strip()) for name in names.split(",")]
    return found


def docstrings_of(path):
    """The docstring of each function of a file, by its name; that of the file by None"""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    found = {None: ast.get_docstring(tree) or ""}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = ast.get_docstring(node) or ""
    return found


def test_every_name_exists():
    rows = [row for table in tables_of(PAGE) for row in table]
    assert len(rows) > 25
    for paper, _, code, tests in rows:
        for path, name in names_in(code):
            assert name in docstrings_of(path), (paper, path, name)
        for path, name in names_in(tests):
            assert name and name in docstrings_of(f"tests/{path}"), (paper, path, name)


def test_every_docstring_names_its_part_of_the_paper():
    of_the_paper, _ = tables_of(PAGE)
    for paper, _, code, _ in of_the_paper:
        part = paper.split(", ")[-1]  # of "Appendix A.1, Figure 2" the figure
        for path, name in names_in(code):
            said = " ".join(docstrings_of(path)[name].split())
            assert part in said, f"{path}: the docstring of {name} does not name {part}"


def test_the_paper_is_complete():
    """Its equations, tables, figures and appendices, and the sections that describe something to
    build"""
    of_the_paper, _ = tables_of(PAGE)
    named = {part for row in of_the_paper for part in row[0].split(", ")}
    assert named == set(PARTS)


def test_the_lesson_sends_nobody_to_a_function_that_is_gone():
    steps = tables_of(ROOT / "docs/lesson.md")[0]
    read = [names_in(row[2]) for row in steps if row[2]]
    assert len(read) == 7
    for names in read:
        for path, name in names:
            assert name in docstrings_of(path), (path, name)
