"""Codebooks on disk; `docs/format.md` says what is in each file.

The modules, the lowest ones first:

    strict_json, headers, manifest      what is read is checked before it is used
    atomic, locks, tensor_files, files  a directory, replaced in one step by the process that has it
    checks, columns, schema             tensors of rows, edits and events, and the rules they keep
    history_columns, history_check      a history as columns; that every edit can be undone
    records, side_files, sqlite_file, journal
                                        a version as bytes, and the file that holds them all
    versions, durable, saved, archive   replaying, editing, opening, carrying elsewhere
    salvage, repair*                    a sound directory of a damaged one
    row_file, large/                    keys and values in files of their own, larger than memory
"""
