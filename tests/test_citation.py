"""CITATION.cff, the licences of the data and the workflow. pytest tests/test_citation.py"""
import re

import pytest

from conftest import ROOT


def test_citation_names_the_paper_and_no_invented_people():
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "MIT"
    assert [set(author) for author in citation["authors"]] == [{"name"}]  # an entity, no person
    paper = citation["preferred-citation"]
    names = [author["family-names"] for author in paper["authors"]]
    assert names == ["Xu", "Qiu", "Kim", "Ladhak", "Do"]
    assert paper["title"] == "Aligning Large Language Models via Fine-grained Supervision"
    assert paper["doi"].endswith(paper["url"].rsplit("/", 1)[1])


def test_every_data_set_that_is_downloaded_has_its_licence():
    """A prepare.py that names an address or a hub data set is in docs/data_licences.md"""
    text = (ROOT / "docs/data_licences.md").read_text(encoding="utf-8")
    downloads = []
    for script in ROOT.glob("data/*/prepare.py"):
        code = script.read_text(encoding="utf-8")
        if re.search(r"https://raw\.|hf_hub_download|tatsu-lab/", code):
            downloads.append(script.parent.name)
            assert f"`data/{script.parent.name}/prepare.py`" in text, script
    assert sorted(downloads) == ["alpacafarm", "paradetox", "qa_feedback"]


def test_the_workflow_calls_ci_run():
    yaml = pytest.importorskip("yaml")
    text = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    steps = yaml.safe_load(text)["jobs"]["tests"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands == ["bash .ci/run"] and (ROOT / ".ci/run").exists()
    assert steps[1]["with"]["python-version"] == "3.11" and "secrets" not in text
