"Build script. All metadata come from settings.ini, which nbdev reads too."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
meta = config["DEFAULT"]

setup(
    name=meta["lib_name"],
    version=meta["version"],
    description=meta["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    author=meta["author"],
    license="Apache-2.0",
    keywords=meta["keywords"].split(),
    python_requires=f">={meta['min_python']}",
    packages=find_packages(include=["strlora", "strlora.*"]),
    package_data={"strlora": ["assets/**/*", "py.typed"]},
    include_package_data=True,
    install_requires=meta["requirements"].split(),
    extras_require={"dev": meta["dev_requirements"].split()},
    entry_points={"console_scripts": meta["console_scripts"].split()},
    zip_safe=False,
)
