"""The commands and options are a promise: changing them is a decision."""

from command_line_helpers import surface

COMMANDS = {
    "": "--config",
    "generate": """
        --attention --chat --debug --device --dtype --expect-model --field --fixed-point
        --frequency-penalty --fuse --hints --ignore-eos --insecure --insecure-same-host --json
        --kv-memory --logit-bias --logprobs --max-tokens --min-p --min-tokens --model-key-file
        --n --no-shm --pad-memory
        --prefill-chunk --presence-penalty --privacy --prompt --prompt-ids --prompt-logprobs
        --prompts --quiet --repetition-penalty --rpc-log --seed --shm-name --split-special --stop
        --stop-token-id --temperature --threads --timeout --top-k --top-p --worker --worker-key
        --workers-file
        MODEL
    """,
    "chat": """
        --api-key --api-key-file --attention --cacert --debug --device --dtype --expect-model
        --field --fixed-point --frequency-penalty --fuse --hints --insecure --insecure-same-host
        --kv-memory --logit-bias --max-tokens --min-p --model-key-file --no-shm --pad-memory
        --prefill-chunk --presence-penalty --privacy --quiet
        --repetition-penalty --rpc-log --seed --shm-name --split-special --stop --stop-token-id
        --system --temperature --threads --timeout --top-k --top-p --url --worker --worker-key
        --workers-file MODEL
    """,
    "serve": """
        --api-key --api-key-file --attention --attest --broker-key --broker-url --debug --device
        --dtype --expect-model --fetch-api-keys --fetch-model-key
        --field --fixed-point --fuse --hints --host --insecure --insecure-same-host --kv-memory
        --max-connections --max-model-len
        --max-num-batched-tokens --max-num-queued-reqs --max-num-seqs --model-key-file --no-shm
        --pad-memory --port
        --prefill-chunk --privacy --quiet --receipts --root-path --rpc-log --served-model-name
        --shm-name --show-worker-view --shutdown-timeout --ssl-certfile --ssl-keyfile --threads
        --timeout --tool-call-parser --uds --worker --worker-key --workers-file MODEL
    """,
    "worker": """
        --debug --device --dtype --insecure --keyfile --listen --max-sessions
        --max-sessions-per-client --max-shm-bytes --max-total-shm-bytes --model-key-file --no-shm
        --quiet --record --serve --shard --shm-name --supervised --threads MODEL
    """,
    "cluster-up": """
        --address --debug --device --dtype --insecure --keys --name --quiet --replicas --resource
        --serve --shards --threads --workers-file MODEL
    """,
    "cluster-status": "--address --debug --json --name",
    "cluster-down": "--address --debug --name --quiet",
    "prepare": "--debug --hints --quiet MODEL OUT",
    "encrypt": "--debug --model-key-file --quiet MODEL OUT",
    "digest": "--debug --dtype --model-key-file --privacy --quiet MODEL",
    "keygen": "--debug FOLDER",
    "doctor": """
        --debug --dtype --insecure --json --model-key-file --only-workers --shm-name --threads
        --worker --worker-key MODEL
    """,
    "verify": "--at --cacert --claims --collateral --debug --json --policy --quote --save URL",
    "collateral": "--debug --out --pccs QUOTE",
    "proxy": """
        --api-key-file --cacert --collateral --debug --host --policy --port --reverify-seconds URL
    """,
    "demo": "--debug --fetch --prompt --quiet",
    "audit": "--again --debug --json --model --prompt-ids --shares RECORDING",
    "bench": """
        --batch --debug --device --dtype --field --modes --new-tokens --out --prompt-tokens
        --quiet --rounds --starts --sustained --threads MODEL
    """,
    "bench-attention": """
        --debug --dtype --out --quiet --sequences --threads --tokens MODEL
    """,
    "bench-kernels": "--debug --out --quiet --widths",
    "bench-transport": "--calls --debug --out --quiet",
    "bench-trusted-side": """
        --debug --dtype --gpu --layers --modes --new-tokens --out --prompt-tokens --quiet --rounds
        --threads MODEL
    """,
    "bench-scaling": "--debug --out --plot --prompt-tokens --quiet --rounds --threads --widths",
    "bench-serve": """
        --api-key-file --debug --long-tokens --new-tokens --out --prompt-tokens --quiet --rounds
        --streams --url
    """,
    "bench-accuracy": "--chunk --debug --max-tokens --out --quiet --text --threads MODEL",
    "keys-serve": """
        --collateral --debug --host --policy --port --secret --ssl-certfile --ssl-keyfile
    """,
    "keys-fetch": "--attest --broker-key --debug --out NAME URL",
    "verify-receipt": """
        --at --collateral --debug --evidence --json --key --policy --receipt --request --response
    """,
    "report": "--against --debug --html --json --trace FILES",
}


def test_the_commands_and_their_options_are_frozen() -> None:
    assert surface() == {name: options.split() for name, options in COMMANDS.items()}
