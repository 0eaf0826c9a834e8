"""Text for people: what planning found, as tables and with numbers in readable units.

Surface: `explain_record`, the text behind `PlanRecord.explain()`, and its parts as data, `stock_torch` and
`group_rejected`; `curve_text`, how a search went; `table`, aligned columns; `human_us`, `human_bytes`, `human_s` and
`human_count`. `_explain` lays out records, with the lines of `_yardsticks` (stock torch, the hardware limit), `_curve`
(an exhaustive search) and `_rejected`; `_table` lays out columns, `_numbers` words numbers.

It only formats what it is given: it neither plans, measures nor prints, and never touches torch, so that stored plans
can be explained on a machine that cannot run them.
"""

from convplan.report._curve import curve_text
from convplan.report._explain import explain_record
from convplan.report._numbers import human_bytes, human_count, human_s, human_us
from convplan.report._rejected import RejectedGroup, group_rejected
from convplan.report._table import Side, one_line, table
from convplan.report._yardsticks import StockTorch, stock_torch

__all__ = [
    "RejectedGroup",
    "Side",
    "StockTorch",
    "curve_text",
    "explain_record",
    "group_rejected",
    "human_bytes",
    "human_count",
    "human_s",
    "human_us",
    "one_line",
    "stock_torch",
    "table",
]
