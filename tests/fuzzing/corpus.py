"""Write tests/corpus: sound files, and damaged ones of every kind with the outcome that each must have.

    python -m fuzzing.corpus

Cases that this does not make, such as those that fuzzing found, stay as they are, and so do sound files that are there.
"""

import shutil
import sys

from .bases import save_bases
from .cases import BASES, CORPUS, describe
from .corpus_data import data_sets
from .corpus_models import models, published
from .corpus_pictures import damaged_photographs, label_maps, sound_photographs
from .corpus_settings import commands, settings

MADE = (sound_photographs, damaged_photographs, label_maps, models, published, data_sets, settings, commands)


def main() -> int:
    if not BASES.is_dir():
        save_bases(BASES)
    names = set()
    for case in (case for make in MADE for case in make()):
        assert case.name not in names, case.name
        names.add(case.name)
        folder = CORPUS / case.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file, data in case.files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)
        describe(case.description | {"expected": case.expected}, folder)
    print(f"{len(names)} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
