"""Write `convplan/schemas/plans.schema.json` from the structs it describes. Run it when a plan record's fields change.

A test compares the file with the structs and fails when this was forgotten.
"""

from convplan._exchange import SCHEMA_FILE, plan_file_schema

if __name__ == "__main__":
    SCHEMA_FILE.parent.mkdir(exist_ok=True)
    SCHEMA_FILE.write_bytes(plan_file_schema())
    print(SCHEMA_FILE)
