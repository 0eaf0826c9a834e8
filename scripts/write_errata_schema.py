"""Write `convplan/schemas/errata.schema.json` from the structs it describes. Run it when a rule's fields change.

A test compares the file with the structs and fails when this was forgotten.
"""

from convplan.engines.cudnn.errata import SCHEMA_PATH, errata_file_schema

if __name__ == "__main__":
    SCHEMA_PATH.parent.mkdir(exist_ok=True)
    SCHEMA_PATH.write_text(errata_file_schema(), encoding="utf-8")
    print(SCHEMA_PATH)
