import subprocess
import sys

from r2kit.catalog import CATALOG, family


def test_names_are_unique() -> None:
    names = [e.name for e in CATALOG]
    assert len(names) == len(set(names))


def test_everything_without_a_pattern() -> None:
    assert family() == list(CATALOG)


def test_wildcards_match_the_whole_name() -> None:
    assert {e.name for e in family("res2netplus???")} == {"res2netplus101", "res2netplus152", "res2netplus50d"}
    assert [e.name for e in family("SCALENET50*")] == ["scalenet50_light", "scalenet50"]


def test_words_match_a_part_of_name_or_family() -> None:
    assert {e.family for e in family("big-little")} == {"Big-Little"}
    assert {e.name for e in family("_6c24w6s")} == {"cifar_res2next29_6c24w6s", "cifar_seres2next29_6c24w6s"}
    assert family("nothing like it") == []


def test_figures_have_sources_and_weights_have_licences() -> None:
    for entry in CATALOG:
        assert (entry.top1 is None) == (entry.source == ""), entry.name
        assert (entry.weights is None) == (entry.licence is None) == (entry.owner == "r2kit"), entry.name


def test_listing_imports_no_torch() -> None:
    code = "import sys; import r2kit.catalog; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
