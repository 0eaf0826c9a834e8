"""Text for people: what planning found, as tables and with numbers in readable units.

Surface: `explain_record`, the table behind `PlanRecord.explain()`; `curve_text`, how a search went; `table`, aligned
columns; `human_us`, `human_bytes` and `human_s`. `_explain` lays out records, `_curve` searches, `_table` columns, and
`_numbers` words numbers.

It only formats what it is given: it neither plans, measures nor prints, and never touches torch, so that stored plans
can be explained on a machine that cannot run them.
"""

from convplan.report._curve import curve_text
from convplan.report._explain import explain_record
from convplan.report._numbers import human_bytes, human_s, human_us
from convplan.report._table import Side, one_line, table

__all__ = ["Side", "curve_text", "explain_record", "human_bytes", "human_s", "human_us", "one_line", "table"]
