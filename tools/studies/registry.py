"""The studies by name."""

from experiments.study import Study

from studies import grokking, inspections, khop, language_studies, scaling, stress, width

STUDIES: dict[str, Study] = {
    study.name: study
    for study in (
        khop.STUDY,
        grokking.STUDY,
        language_studies.LOOPS,
        language_studies.COST,
        language_studies.ATTENTION,
        language_studies.ROUTING,
        stress.STUDY,
        inspections.STABILITY,
        inspections.HALTING,
        scaling.STUDY,
        width.STUDY,
    )
}
