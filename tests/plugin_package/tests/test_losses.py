from opd_outsider import OutsiderKL

from stable_opd.testing import check_component


def test_outsider_keeps_to_the_contract() -> None:
    check_component(OutsiderKL)
