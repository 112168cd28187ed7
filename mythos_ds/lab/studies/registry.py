"""The studies by name."""

from mythos_ds.lab.studies import (
    context,
    decay,
    grokking,
    groups,
    inspections,
    khop,
    language_studies,
    retrofit,
    scaling,
    stress,
    width,
)
from mythos_ds.lab.study import Study

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        khop.STUDY,
        grokking.STUDY,
        language_studies.LOOPS,
        language_studies.COST,
        language_studies.ATTENTION,
        language_studies.ROUTING,
        decay.STUDY,
        retrofit.STUDY,
        stress.STUDY,
        inspections.STABILITY,
        inspections.HALTING,
        scaling.STUDY,
        width.STUDY,
        context.STUDY,
        groups.STUDY,
    )
}
