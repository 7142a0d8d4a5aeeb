//! Which node a table in a pod belongs to: each of our tables contains a chain that nothing jumps to, with the node's
//! tag in a comment. Several nodes may run on one machine, and none cleans up the pods of another one.

use serde_json::Value;

/// Name of the chain.
const CHAIN: &str = "written_for";
/// The tag of rules that a workload has written itself (`culvert redirect`). No node removes them: the daemon beside the
/// workload counts on them.
pub const WORKLOAD: &str = "the-workload-itself";

/// The chain, as part of a table. The tag consists of letters, digits, dots, dashes and underscores.
pub fn chain(node_tag: &str) -> String {
    format!("  chain {CHAIN} {{\n    return comment \"{node_tag}\"\n  }}\n")
}

/// The tag in a table as `nft` prints it; `None` if it has none.
pub fn owner(table: &Value) -> Option<&str> {
    let objects = table.get("nftables").and_then(Value::as_array)?;
    let says = |object: &'_ Value| object.pointer("/rule/chain").is_some_and(|chain| chain == CHAIN);
    objects.iter().find(|object| says(object))?.pointer("/rule/comment")?.as_str()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_table_has_the_tag_of_its_node_or_none() {
        let rule = |chain: &str| json!({"rule": {"chain": chain, "comment": "n1-7", "expr": [{"return": null}]}});
        let metainfo = json!({"metainfo": {}});
        assert_eq!(owner(&json!({"nftables": [metainfo, rule("other"), rule(CHAIN)]})), Some("n1-7"));
        for none in
            [json!({"nftables": [rule("other")]}), json!({"nftables": [{"rule": {"chain": CHAIN}}]}), Value::Null]
        {
            assert_eq!(owner(&none), None, "{none}");
        }
        assert!(chain("n1-7").contains("return comment \"n1-7\""));
    }
}
