"""Write `convplan/schemas/problems.schema.json` from the structs it describes. Run after changing what an entry holds.

A test compares the file with the structs and fails when this was forgotten.
"""

from convplan._problem_files import SCHEMA_PATH, problem_file_schema

if __name__ == "__main__":
    SCHEMA_PATH.parent.mkdir(exist_ok=True)
    SCHEMA_PATH.write_text(problem_file_schema(), encoding="utf-8")
    print(SCHEMA_PATH)
