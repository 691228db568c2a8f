"""Prints the lowest declared version of every dependency but torch as pip constraints, one `name==version` a line.

    python .ci/minima.py > minima.txt && pip install -e . -c minima.txt

Reads the metadata of the installed package. torch is left out: builds as old as its minimum are gigabytes of CUDA.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

for line in requires("tokcom_hf") or []:
    requirement = Requirement(line)
    minimum = [item.version for item in requirement.specifier if item.operator == ">="]
    if requirement.name != "torch" and requirement.marker is None and minimum:
        print(f"{requirement.name}=={minimum[0]}")
