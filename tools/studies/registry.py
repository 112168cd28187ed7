"""The studies by name."""

from mythos_ds.lab.study import Study

from . import khop, language_studies, scaling, stress, width

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        khop.STUDY,
        language_studies.LOOPS,
        language_studies.COST,
        language_studies.ATTENTION,
        language_studies.ROUTING,
        stress.STUDY,
        scaling.STUDY,
        width.STUDY,
    )
}
