# SPDX-License-Identifier: Apache-2.0
"""The files that repositories and their visitors look for say what is true."""

import re
from pathlib import Path

import yaml

import lightning_optkit as ok

ROOT = Path(__file__).parents[1]


def test_the_citation_has_the_version_and_the_license():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["version"] == ok.__version__
    assert cited["license"] == "Apache-2.0" and (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
    assert re.search(rf'^version = "{cited["version"]}"$', (ROOT / "pyproject.toml").read_text(), flags=re.M)


def test_a_report_of_a_bug_asks_for_optkit_info():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    fields = {field["id"]: field for field in form["body"]}
    assert fields["info"]["validations"]["required"] and "optkit info" in fields["info"]["attributes"]["description"]
    for path in re.findall(r"docs/\w+\.md", str(form)):
        assert (ROOT / path).exists()


def test_the_commands_of_the_security_page_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", (ROOT / "SECURITY.md").read_text()):
        assert re.search(rf"^{target}:", makefile, flags=re.M)
