"""What must not happen, and the tests that show that it does not.

`FAULTS`: crashes, damage and bad input; `ATTACKS`: what was seen in the field, by its CVE or advisory; `RULES`: of
pulling and of content. Each test is `<file>::<function>` below tests/; test_matrix.py sees that all of them exist.
`OPEN` names what no test shows yet, and why.
"""

from __future__ import annotations

_BUS, _INPUT, _OUTAGE = "conformance/test_bus.py", "conformance/test_bus_input.py", "conformance/test_bus_outage.py"
_HOSTILE, _TRUST, _REAL = (f"client/test_registry_{name}.py" for name in ("hostile", "trust", "real"))
_PULL, _IMPORT, _DOCUMENTS = "client/test_pull.py", "client/test_import.py", "client/test_registry_documents.py"
_ESCAPES, _RULES_OF_TAR, _TAR, _INFLATE = (f"diff/test_{n}.py" for n in ("escapes", "rules", "tar", "decompress"))
_STORAGE, _GC, _FUZZ = "faults/test_storage.py", "conformance/test_gc.py", "fuzz/test_fuzz.py"
_CONTENT, _KILLS, _DISK = "content/test_crashes.py", "content/test_kills.py", "content/test_disk.py"
_SNAPSHOT, _FULL = "snapshot/test_crash.py", "snapshot/test_full_disk.py"
_SQLITE, _CREDS, _TENANTS = "shared/test_sqlite.py", "shared/test_credentials.py", "e2e/test_tenants.py"
_STDIO = "e2e/test_stdio.py"
_MONITOR, _MONITOR_FAULTS = "task/test_monitor.py", "task/test_monitor_faults.py"
_TASK, _TASKS, _SPEC = "conformance/test_task.py", "faults/test_tasks.py", "client/test_spec.py"
_OPERATIONS, _RECOVERY, _STREAMS = (f"conformance/test_task_{name}.py" for name in ("operations", "recovery", "stdio"))

FAULTS: dict[str, tuple[str, ...]] = {
    "1 content killed during an ingest": (
        f"{_CONTENT}::test_killed_in_the_middle_of_an_ingest",
        f"{_KILLS}::test_the_holder_is_killed_and_another_goes_on",
        f"{_KILLS}::test_unavailable_soon_when_nobody_is_left",
        "content/test_durable.py::test_after_another_boot_the_durable_bytes_count",
        "content/test_process.py::test_killed_under_a_writer_that_goes_on",
    ),
    "2 content killed between blob and record": (
        f"{_CONTENT}::test_killed_before_the_row_is_there",
        f"{_CONTENT}::test_killed_after_the_row_is_there",
        f"{_CONTENT}::test_killed_between_the_row_and_the_file_of_a_deletion",
        "client/test_usage.py::test_what_an_image_lacks",
        "e2e/test_doctor.py::test_an_image_that_lacks_a_layer",
    ),
    "3 snapshot killed at any step": (
        f"{_SNAPSHOT}::test_prepare",
        f"{_SNAPSHOT}::test_commit",
        f"{_SNAPSHOT}::test_commit_onto_a_parent",
        f"{_SNAPSHOT}::test_remove",
        f"{_SNAPSHOT}::test_a_crash_in_the_cleanup_is_cleaned_up",
        "conformance/test_snapshot_once.py::test_the_same_key_has_one_effect",
    ),
    "4 diff killed while it unpacks": (
        f"{_STORAGE}::test_diff_killed_while_it_extracts",
        f"{_STORAGE}::test_what_a_dead_client_extracted_goes_with_its_lease",
        "conformance/test_diff.py::test_a_killed_worker_costs_one_call",
        "faults/test_services.py::test_kill_during_a_pull",
    ),
    "5 image killed during a pull": (
        f"{_STORAGE}::test_image_killed_during_a_pull",
        f"{_PULL}::test_an_interrupted_pull_is_taken_up_by_the_next",
        "client/test_pull_node.py::test_an_interrupted_pull_is_taken_up_after_a_collection",
        f"{_GC}::test_a_lease_keeps_until_it_is_deleted",
    ),
    "6 container killed when it had taken effect": (
        "faults/test_deliveries.py::test_three_deliveries_and_one_to_the_next_process",
        "conformance/test_container.py::test_all_is_there_after_a_restart_and_a_key_is_one_effect",
        f"{_OUTAGE}::test_an_answer_that_got_lost_is_given_again_by_the_next_process",
    ),
    "7 task killed while much runs": (
        f"{_STDIO}::test_a_log_goes_on_while_the_task_service_is_dead",
        f"{_STDIO}::test_a_terminal_survives_the_bus",
        f"{_TASKS}::test_ends_while_the_task_service_is_dead",
        f"{_RECOVERY}::test_a_start_whose_record_was_lost",
        f"{_RECOVERY}::test_a_reboot_ends_everything_once",
        f"{_TASK}::test_what_a_restart_finds",
        f"{_STREAMS}::test_a_restart_of_the_service_loses_and_repeats_nothing",
        "conformance/test_task_holds.py::test_a_hold_outlives_its_service_and_ends_after_it",
        f"{_RECOVERY}::test_what_ran_from_a_state_directory_that_is_gone_runs_no_more",
    ),
    "8 a monitor killed or hanging": (
        f"{_TASK}::test_a_killed_monitor",
        f"{_RECOVERY}::test_a_monitor_that_hangs_costs_its_own_container_only",
        f"{_RECOVERY}::test_everything_of_a_killed_node",
        f"{_TASKS}::test_a_node_that_is_killed_altogether",
        f"{_MONITOR_FAULTS}::test_after_a_killed_monitor_nothing_is_left",
        f"{_MONITOR_FAULTS}::test_a_monitor_and_its_zygote_gone_leave_a_cleaner_enough",
        "faults/test_services.py::test_a_monitor_that_dies_costs_its_own_container_only",
    ),
    "10 the bus killed": (
        f"{_TASKS}::test_what_is_asked_while_the_bus_is_down",
        f"{_OUTAGE}::test_what_is_asked_while_the_bus_is_down_is_never_done",
        f"{_OUTAGE}::test_what_a_frozen_bus_holds_back_is_dropped_as_late",
        "faults/test_services.py::test_a_killed_bus",
    ),
    "11 the bus goes under an attached terminal": (
        f"{_STDIO}::test_a_terminal_survives_the_bus",
        f"{_STDIO}::test_a_hundred_megabytes",
        "conformance/test_task_stdio.py::test_where_bytes_are_missing_a_client_writes_how_many",
    ),
    "12 an end while the bus is down": (
        "faults/test_watch.py::test_an_end_while_the_bus_is_down_is_told_once_and_with_its_time",
        "shared/test_outbox.py::test_the_bus_is_killed_and_comes_back",
        "shared/test_outbox.py::test_the_bus_is_killed_in_the_middle",
        "shared/test_outbox.py::test_stopping_without_a_bus_leaves_it_for_the_next",
    ),
    "13 power cut": (
        f"{_STORAGE}::test_the_power_is_cut_when_a_pull_was_answered",
        "content/test_power.py::test_a_commit_that_was_answered_is_there",
        "content/test_power.py::test_an_ingest_goes_on_from_what_is_durable",
        "snapshot/test_syncer.py::test_a_power_cut",
        "snapshot/test_syncer.py::test_a_prepared_directory_that_the_power_took_is_made_again",
        "snapshot/test_syncer.py::test_what_was_being_unpacked_as_the_power_went_keeps_nothing",
        "shared/test_outbox.py::test_what_was_sent_and_not_put_aside_is_looked_for_batch_by_batch",
        f"{_SQLITE}::test_what_was_answered_survives_a_kill",
    ),
    "15 upgrade and downgrade": (
        "faults/test_upgrade.py::test_every_row_is_there",
        "faults/test_upgrade.py::test_old_rows_are_collected_like_new_ones",
        "faults/test_upgrade.py::test_a_task_that_ended_before_keeps_its_exit",
        "faults/test_upgrade.py::test_a_newer_schema_is_refused_by_name",
        f"{_SQLITE}::test_a_migration_that_fails_changes_nothing",
        "e2e/test_nodes.py::test_containers_outlive_their_node",
    ),
    "16 disk full": (
        "faults/test_disk.py::test_full_disk",
        f"{_DISK}::test_a_full_disk",
        f"{_DISK}::test_a_full_disk_lets_go_of_blobs",
        f"{_DISK}::test_no_space_for_the_row",
        f"{_FULL}::test_a_full_disk",
        f"{_FULL}::test_a_database_without_room",
        "diff/test_apply.py::test_a_full_disk_is_named",
        f"{_SQLITE}::test_removals_go_on_for_long_on_a_full_disk",
        "introspection/test_doctor_host.py::test_a_disk_that_cannot_be_written",
    ),
    "17 no inodes": (f"{_STORAGE}::test_a_disk_without_inodes", f"{_DISK}::test_no_inodes"),
    "18 a flipped byte in a blob": (
        f"{_STORAGE}::test_a_rotten_layer_is_not_unpacked_and_the_next_pull_heals_it",
        f"{_DISK}::test_a_flipped_bit_is_found_put_aside_and_healed",
        f"{_DISK}::test_a_short_or_missing_file_is_told_and_healed_for_every_namespace",
        "client/test_export.py::test_a_rotten_blob_is_not_exported",
        "client/test_pull_node.py::test_a_pull_heals_a_layer_that_has_become_rotten",
    ),
    "19 a damaged database": (
        f"{_SQLITE}::test_a_damaged_database_is_refused_by_name",
        f"{_SQLITE}::test_a_database_that_is_gone_is_not_begun_anew",
        f"{_SQLITE}::test_damage_under_a_running_service",
        "shared/test_backup.py::test_a_damaged_database_is_refused_and_restored_when_told",
        "snapshot/test_restore.py::test_a_restored_database_may_be_older",
    ),
    "20 a flipped bit in the event stream": (
        "faults/test_jetstream.py::test_a_flipped_bit_is_a_hole_that_is_told",
        "faults/test_jetstream.py::test_no_other_event_is_made_of_it",
        "faults/test_jetstream.py::test_a_stream_that_was_cut_and_grew_again_is_not_taken_for_the_old_one",
        "faults/test_jetstream.py::test_a_cut_end_is_noticed_by_a_service_that_was_down_too",
        "events/test_process.py::test_a_stream_that_was_made_anew_is_another",
        "events/test_process.py::test_what_is_kept_is_bounded_and_a_gap_is_told",
    ),
    "21 two services on one root": (
        "faults/test_same_root.py::test_the_second_one_ends",
        "conformance/test_snapshot_once.py::test_a_second_service_on_the_root_is_refused",
        f"{_KILLS}::test_a_private_backend_has_one_service_on_a_root",
        "content/test_process.py::test_two_processes_on_one_root",
        "e2e/test_nodes.py::test_a_second_node_on_the_same_root_is_refused",
        "e2e/test_twins.py::test_another_node_of_the_name_is_refused",
        "e2e/test_twins.py::test_what_belongs_to_the_node_is_not",
        f"{_RECOVERY}::test_a_copied_root_does_not_touch_what_the_original_runs",
    ),
    "23 names that are none": (
        f"{_INPUT}::test_invalid_namespaces_never_reach_the_bus",
        f"{_INPUT}::test_tokens_are_validated_again_by_the_service",
        f"{_INPUT}::test_namespaces_with_dots",
        f"{_OPERATIONS}::test_names_are_identifiers_and_namespaces_apart",
        "conformance/test_container.py::test_an_id_is_an_identifier",
    ),
    "24 another namespace than one's own": (
        f"{_INPUT}::test_tokens_are_validated_again_by_the_service",
        f"{_CREDS}::test_a_tenant_publishes_in_its_own_namespace_only",
        f"{_CREDS}::test_wildcards_in_ones_own_prefix_are_refused_by_the_service",
        f"{_CREDS}::test_a_caller_is_known_by_the_inbox_that_it_wants_the_answer_in",
        f"{_TENANTS}::test_another_namespace_is_closed",
        "shared/test_audit.py::test_a_refusal_is_told_and_nothing_of_what_was_sent",
    ),
    "25 others' events, inboxes and streams": (
        f"{_CREDS}::test_a_tenant_sees_its_own_namespace_only",
        f"{_CREDS}::test_a_tenants_events_are_those_of_its_namespace",
        f"{_CREDS}::test_a_caller_is_known_by_the_inbox_that_it_wants_the_answer_in",
        f"{_CREDS}::test_an_answer_goes_to_who_asked_and_once",
        f"{_CREDS}::test_inbox_prefixes_are_secrets_of_the_seeds",
    ),
    "26 bodies and headers that are none": (
        f"{_INPUT}::test_malformed_bodies",
        f"{_INPUT}::test_a_body_over_the_limit",
        f"{_INPUT}::test_a_flood_of_headers",
        f"{_INPUT}::test_numbers_that_are_none",
        f"{_OUTAGE}::test_hostile_bodies_do_not_fill_the_services_memory",
        f"{_FUZZ}::test_a_bounded_run",
        "shared/test_protocol.py::test_what_is_no_protocol_is_reported_once_and_nothing_follows",
    ),
    "27 duplicate deliveries": (
        "faults/test_deliveries.py::test_three_deliveries_and_one_to_the_next_process",
        "faults/test_deliveries.py::test_every_mutation_of_the_storage_half_is_here",
        "faults/test_task_deliveries.py::test_three_deliveries_and_one_to_the_next_process",
        "faults/test_task_deliveries.py::test_every_mutation_of_the_runtime_half_is_here",
        f"{_BUS}::test_three_deliveries_have_one_effect_and_equal_answers",
        f"{_BUS}::test_two_members_of_a_queue_on_one_database",
        "content/test_replicas.py::test_an_open_that_is_delivered_to_both_has_one_answer",
    ),
    "28 a slow subscriber": (
        "conformance/test_events.py::test_a_slow_subscriber_is_told_and_catches_up_by_its_token",
        "shared/test_subscriber.py::test_a_slow_subscriber_is_told_where_its_hole_is",
        "events/test_watch.py::test_a_slow_reader_misses_nothing",
        "events/test_watch.py::test_what_expired_is_told_and_the_rest_comes",
    ),
    "30 strangers at the port": (
        "faults/test_strangers.py::test_a_container_on_the_hosts_network",
        "faults/test_strangers.py::test_another_user_of_the_machine",
        "faults/test_strangers.py::test_a_flood_of_strangers",
        f"{_CREDS}::test_nobody_gets_in_without_credentials",
        f"{_CREDS}::test_everything_is_its_owners_alone",
    ),
    "31 an old or open server": (
        "shared/test_connection.py::test_an_old_server_is_refused_before_credentials_leave",
        "shared/test_connection.py::test_a_server_that_lets_everybody_in_is_refused",
        "shared/test_connection.py::test_versions_that_will_not_do",
        f"{_CREDS}::test_the_table_is_one_that_the_server_takes",
        "e2e/test_deploy.py::test_nats_server_accepts_a_nodes_configuration_and_no_anonymous_one",
    ),
    "32 a connection that breaks off": (
        f"{_PULL}::test_a_layer_that_breaks_off_is_resumed",
        f"{_REAL}::test_a_dropped_connection_is_resumed_where_it_broke",
        f"{_HOSTILE}::test_a_broken_body_is_resumed_with_a_bounded_range",
        f"{_HOSTILE}::test_a_registry_without_ranges_is_discarded_to_the_offset_once",
    ),
    "33 wrong bytes": (
        f"{_PULL}::test_a_layer_of_other_bytes_is_not_committed",
        f"{_HOSTILE}::test_a_wrong_length_is_data_loss_at_once",
        f"{_HOSTILE}::test_a_body_that_stays_short_is_data_loss",
        f"{_HOSTILE}::test_a_digest_header_is_compared_and_never_trusted",
        f"{_HOSTILE}::test_a_manifest_of_other_bytes_is_data_loss",
        "conformance/test_content.py::test_a_wrong_digest_or_size_is_refused_and_the_ingest_stays",
    ),
    "34 slow, busy and endless registries": (
        f"{_HOSTILE}::test_statuses_are_errors_after_bounded_tries",
        f"{_HOSTILE}::test_a_slow_loris_is_given_up",
        f"{_HOSTILE}::test_a_drip_of_connections_ends",
        f"{_HOSTILE}::test_a_body_without_length_is_cut_at_size_plus_one",
        f"{_TRUST}::test_a_registry_that_refuses_every_token_is_asked_twice",
    ),
    "35 redirects and realms": (
        f"{_TRUST}::test_a_redirect_that_is_not_acceptable_is_refused",
        f"{_TRUST}::test_authorization_does_not_follow_to_another_origin",
        f"{_TRUST}::test_credentials_do_not_go_to_a_realm_that_is_not_acceptable",
        f"{_TRUST}::test_a_public_registry_may_not_point_to_this_machine",
        f"{_TRUST}::test_nothing_secret_is_said",
    ),
    "36 bombs": (
        f"{_INFLATE}::test_bombs_are_stopped_by_their_ratio_and_by_their_size",
        f"{_INFLATE}::test_a_bomb_does_not_fill_the_memory",
        f"{_ESCAPES}::test_five_million_entries_end_at_the_bound",
        f"{_ESCAPES}::test_a_bomb_ends_in_the_middle_of_its_file",
        f"{_HOSTILE}::test_an_oversized_manifest_is_not_read",
        f"{_PULL}::test_ten_thousand_layers_are_refused",
        f"{_PULL}::test_a_cycle_of_indexes_is_met_as_wrong_bytes",
        f"{_IMPORT}::test_a_bomb",
    ),
    "37 layers that try to get out": (
        f"{_ESCAPES}::test_what_would_escape_stays_inside",
        f"{_ESCAPES}::test_what_is_refused",
        f"{_ESCAPES}::test_what_is_bounded",
        f"{_ESCAPES}::test_nothing_outside_changes_whatever_the_entries",
        f"{_ESCAPES}::test_a_directory_that_is_moved_up_does_not_lead_out",
        f"{_FUZZ}::test_a_bounded_run",
    ),
    "38 want of memory": (
        f"{_OPERATIONS}::test_want_of_memory_is_told_and_marked",
        f"{_MONITOR}::test_too_much_memory_is_told_before_the_exit",
        f"{_MONITOR}::test_an_exec_that_runs_out_of_memory_is_told_while_the_container_runs",
    ),
    "40 lists and collection": (
        "faults/test_listing.py::test_ps_among_ten_thousand",
        "conformance/test_container.py::test_ten_thousand_are_walked_while_others_are_served",
        "lease/test_model.py::test_what_lives_stays_and_what_is_dead_goes",
        f"{_GC}::test_a_pull_with_a_collection_between_any_two_steps",
        f"{_GC}::test_a_collection_with_a_service_away_removes_nothing",
        f"{_GC}::test_many_pages",
        "shared/test_catalog.py::test_ten_thousand_come_in_pages_and_others_run_meanwhile",
    ),
}  # fmt: skip

ATTACKS: dict[str, tuple[str, ...]] = {
    "CVE-2020-15157": (f"{_TRUST}::test_foreign_layers_are_off_and_anonymous_when_on",),
    "CVE-2020-15257": (
        f"{_MONITOR_FAULTS}::test_the_zygote_keeps_no_children_and_no_sockets_are_abstract",
        f"{_CREDS}::test_nobody_gets_in_without_credentials",
    ),
    "CVE-2021-21334": (f"{_OPERATIONS}::test_each_has_its_own_environment",),
    "CVE-2021-32760": (f"{_ESCAPES}::test_hard_links_over_symlinks_are_never_followed",),
    "CVE-2021-41103, CVE-2024-25621": (
        "e2e/test_userns.py::test_root_is_nobody_on_the_node_and_owns_its_files",
        "conformance/test_snapshot_once.py::test_nobody_else_can_walk_into_the_snapshots",
        "snapshot/test_overlay.py::test_directories_have_their_modes_and_owners",
        f"{_DISK}::test_modes",
        f"{_CREDS}::test_everything_is_its_owners_alone",
    ),
    "CVE-2021-41190": (
        f"{_PULL}::test_a_manifest_that_is_an_index_too_is_refused",
        f"{_IMPORT}::test_a_manifest_that_is_an_index_too",
        f"{_DOCUMENTS}::test_an_ambiguous_document_is_refused",
        f"{_FUZZ}::test_a_bounded_run",
    ),
    "CVE-2021-43816": ("client/test_volumes.py::test_nothing_of_the_host_is_labelled_anew",),
    "CVE-2022-23471, CVE-2025-64329": (
        f"{_MONITOR}::test_execs_leave_no_descriptors_behind",
        f"{_STREAMS}::test_readers_that_vanish_leave_nothing",
        f"{_STDIO}::test_clients_that_vanish",
    ),
    "CVE-2022-23648": (f"{_SPEC}::test_an_images_volumes_take_nothing_from_the_node",),
    "CVE-2022-24769": (
        f"{_SPEC}::test_the_default_is_confined",
        "e2e/test_run_flags.py::test_a_container_is_confined_unless_told_otherwise",
    ),
    "CVE-2022-31030": (f"{_STDIO}::test_a_collected_output_is_capped",),
    "CVE-2023-25173": ("client/test_users.py::test_groups_are_added",),
    "CVE-2023-25153": (
        f"{_IMPORT}::test_a_document_of_a_gibibyte_is_refused_at_its_header",
        f"{_IMPORT}::test_a_pax_header_of_many_mebibytes",
    ),
    "CVE-2024-40635": ("e2e/test_cli.py::test_run_refuses_what_would_escape",),
    "CVE-2024-21626": ("e2e/test_cli.py::test_run_refuses_what_would_escape",),
    "CVE-2025-47291": ("e2e/test_userns.py::test_limits_hold_for_it_too",),
    "CVE-2026-47262": ("client/test_users.py::test_a_passwd_of_2_gib_is_refused_unread",),
    "CVE-2026-53488": (
        f"{_SPEC}::test_what_an_image_may_not_say_is_dropped_and_told",
        f"{_STREAMS}::test_streams_that_are_refused",
    ),
    "CVE-2026-50195, CVE-2026-53492, CVE-2026-53489": (
        f"{_IMPORT}::test_checkpoints",
        f"{_IMPORT}::test_containerds_own_checkpoints",
    ),
    "a reference that leads elsewhere": ("client/test_registry_reference.py::test_what_is_no_reference_is_refused",),
    "numbers out of range in tar": (f"{_TAR}::test_refused_headers",),
    "a negative source date epoch": ("conformance/test_diff.py::test_what_cannot_be_compared_is_refused",),
    "credentials in errors": (
        f"{_TRUST}::test_nothing_secret_is_said",
        "client/test_registry_credentials.py::test_a_broken_file_is_an_error_that_shows_nothing_of_it",
    ),
    "CVE-2021-29136": (f"{_ESCAPES}::test_what_would_escape_stays_inside",),
    "tarfile: CVE-2024-12718, CVE-2025-4138, CVE-2025-4330, CVE-2025-4435, CVE-2025-4517, CVE-2025-8194": (
        f"{_ESCAPES}::test_what_would_escape_stays_inside",
        f"{_TAR}::test_endless_sparse_maps",
        f"{_FUZZ}::test_a_bounded_run",
    ),
    "server-side request forgery by realm or redirect": (
        f"{_TRUST}::test_credentials_do_not_go_to_a_realm_that_is_not_acceptable",
        f"{_TRUST}::test_a_redirect_that_is_not_acceptable_is_refused",
        "client/test_push.py::test_an_upload_does_not_go_where_the_registry_may_not_point",
    ),
    "a token that is attached again after a redirect": (
        f"{_TRUST}::test_authorization_is_not_put_back_when_the_chain_returns",
        f"{_TRUST}::test_a_401_after_a_redirect_gets_no_credentials",
    ),
    "host paths and other programs for a tenant": (
        f"{_TENANTS}::test_no_way_to_the_host",
        f"{_TENANTS}::test_no_way_to_the_kernels_settings",
        f"{_TENANTS}::test_no_two_containers_write_to_one_root_filesystem",
        f"{_TENANTS}::test_no_way_to_the_host_by_a_restart_policy",
        f"{_TENANTS}::test_no_way_to_the_host_by_an_admins_exec",
        f"{_TENANTS}::test_foreign_directories_are_no_mounts_for_a_tenant",
        f"{_TENANTS}::test_stdio_stays_in_the_nodes_own_directory",
        "conformance/test_container.py::test_what_a_tenant_says_by_another_type_is_its_word_too",
    ),
    "a tenant that leaves nothing of a service to others": (
        f"{_BUS}::test_one_tenant_leaves_room_for_others",
        "shared/test_answers.py::test_deliveries_of_one_key_fill_no_memory",
        "snapshot/test_workers.py::test_one_tenants_work_holds_up_nobody_else",
        "content/test_verify.py::test_one_namespace_verifies_a_few_at_a_time",
        "diff/test_pool.py::test_one_tenants_layers_hold_up_nobody_elses",
        f"{_STREAMS}::test_others_have_their_turn_while_the_end_of_a_long_log_is_looked_for",
    ),
}

RULES: dict[str, tuple[str, ...]] = {
    "1 authorization belongs to an origin, names are pinned": (
        f"{_TRUST}::test_authorization_does_not_follow_to_another_origin",
        f"{_TRUST}::test_https_is_not_left_for_http",
        f"{_TRUST}::test_a_realm_does_not_redirect_credentials",
        f"{_TRUST}::test_a_name_is_looked_up_once_and_the_vetted_address_is_used",
        "client/test_registry_mirrors.py::test_a_token_of_one_host_is_not_sent_to_another",
    ),
    "2 foreign layers": (f"{_TRUST}::test_foreign_layers_are_off_and_anonymous_when_on",),
    "3 digests": (
        "conformance/test_content.py::test_a_digest_is_checked",
        f"{_HOSTILE}::test_a_digest_header_is_compared_and_never_trusted",
        f"{_HOSTILE}::test_a_body_without_length_is_cut_at_size_plus_one",
    ),
    "4 ranges": (
        f"{_HOSTILE}::test_a_lie_about_the_range_is_data_loss",
        f"{_HOSTILE}::test_a_registry_without_ranges_is_discarded_to_the_offset_once",
    ),
    "5 documents": (
        f"{_DOCUMENTS}::test_depth_and_size_are_bounded",
        f"{_DOCUMENTS}::test_counts_are_bounded",
        f"{_DOCUMENTS}::test_what_is_not_strict_json_is_refused",
        f"{_FUZZ}::test_a_bounded_run",
    ),
    "6 decompression": (
        f"{_INFLATE}::test_bombs_are_stopped_by_their_ratio_and_by_their_size",
        f"{_ESCAPES}::test_what_is_bounded",
        f"{_TAR}::test_bounds",
    ),
    "7 tries": (
        f"{_HOSTILE}::test_retry_after_is_a_number_or_a_date",
        f"{_HOSTILE}::test_statuses_are_errors_after_bounded_tries",
        f"{_HOSTILE}::test_trouble_that_passes_is_not_noticed",
    ),
    "8 stdio": (
        f"{_TENANTS}::test_stdio_stays_in_the_nodes_own_directory",
        "conformance/test_task_stdio.py::test_what_a_tenant_may_not_name",
        "conformance/test_task_stdio.py::test_a_logger_of_the_nodes",
        f"{_MONITOR}::test_streams_that_are_no_streams_are_refused",
        f"{_MONITOR}::test_a_fifo_that_nobody_opens_blocks_nothing",
    ),
    "9 names on the bus": (
        f"{_INPUT}::test_invalid_namespaces_never_reach_the_bus",
        f"{_INPUT}::test_tokens_are_validated_again_by_the_service",
        f"{_INPUT}::test_a_flood_of_headers",
    ),
    "10 isolated content": (
        "conformance/test_content_shared.py::test_isolated_shares_nothing",
        "conformance/test_content.py::test_namespaces_see_only_what_is_theirs",
        f"{_TENANTS}::test_content_is_not_shared_between_namespaces",
    ),
}

OPEN: dict[str, str] = {
    "CVE-2026-53495": "its text was not to be had",
}
