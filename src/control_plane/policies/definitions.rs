//! Tests: the definitions of the kinds in `daemonset/alone/crds.yaml` are what is converted here.

use super::object::Kind;
use super::rules::{CONDITION, HTTP, OPERATION, SOURCE};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde_json::Value;
use std::collections::BTreeSet;

fn definitions() -> Vec<Value> {
    let text = include_str!("../../../daemonset/alone/crds.yaml");
    let parts = text.split("\n---\n").skip(1);
    parts.map(|part| serde_saphyr::from_str(part).unwrap()).collect()
}

fn schema(definition: &Value, version: usize) -> &Value {
    &definition["spec"]["versions"][version]["schema"]["openAPIV3Schema"]
}

/// The rules of structural schemas, as far as this file could break them: each value has one type, and nothing is given
/// that its type does not have.
fn check(schema: &Value, path: &str, wrong: &mut Vec<String>) {
    const PLAIN: [&str; 10] = [
        "description",
        "enum",
        "format",
        "maxLength",
        "minLength",
        "pattern",
        "type",
        "x-kubernetes-int-or-string",
        "x-kubernetes-validations",
        "anyOf",
    ];
    // Without x-kubernetes-preserve-unknown-fields: who may write one object could nest a value in it so deeply that no
    // list with the object can be read.
    const OBJECT: [&str; 8] = [
        "additionalProperties",
        "description",
        "maxProperties",
        "minProperties",
        "properties",
        "required",
        "type",
        "x-kubernetes-validations",
    ];
    const ARRAY: [&str; 7] = [
        "description",
        "items",
        "maxItems",
        "type",
        "x-kubernetes-list-map-keys",
        "x-kubernetes-list-type",
        "x-kubernetes-validations",
    ];
    let (allowed, kind): (&[&str], &str) = match schema["type"].as_str() {
        Some("object") => (&OBJECT, "object"),
        Some("array") => (&ARRAY, "array"),
        Some("string" | "integer" | "boolean") => (&PLAIN, "plain"),
        None if schema["x-kubernetes-int-or-string"] == Value::Bool(true) => (&PLAIN, "plain"),
        other => return wrong.push(format!("{path}: type {other:?}")),
    };
    for name in schema.as_object().unwrap().keys().filter(|name| !allowed.contains(&name.as_str())) {
        wrong.push(format!("{path}: {name} is not for {kind}s"));
    }
    if schema.get("properties").is_some() && schema.get("additionalProperties").is_some() {
        wrong.push(format!("{path}: properties and additionalProperties"));
    }
    for (name, below) in schema["properties"].as_object().into_iter().flatten() {
        check(below, &format!("{path}.{name}"), wrong);
    }
    for name in schema["required"].as_array().into_iter().flatten() {
        if schema["properties"].get(name.as_str().unwrap()).is_none() {
            wrong.push(format!("{path}: requires {name}"));
        }
    }
    for name in ["items", "additionalProperties"] {
        if let Some(below) = schema.get(name) {
            check(below, &format!("{path}.{name}"), wrong);
        }
    }
}

#[test]
fn the_definitions_are_structural_and_the_same_in_both_versions() {
    let all = definitions();
    assert_eq!(all.len(), Kind::ALL.len());
    for (definition, kind) in all.iter().zip(Kind::ALL) {
        let read: CustomResourceDefinition = serde_json::from_value(definition.clone()).unwrap();
        let resource = kind.resource();
        assert_eq!(read.metadata.name.unwrap(), format!("{}.{}", resource.plural, resource.group));
        assert_eq!((read.spec.names.plural, read.spec.names.kind), (resource.plural, resource.kind));
        let versions: Vec<_> = read.spec.versions.iter().map(|v| (v.name.as_str(), v.served, v.storage)).collect();
        assert_eq!(versions, [("v1", true, true), ("v1beta1", true, false)]);
        assert!(read.spec.versions.iter().all(|v| v.subresources.as_ref().is_some_and(|s| s.status.is_some())));
        assert_eq!(schema(definition, 0), schema(definition, 1));
        let mut wrong = Vec::new();
        check(schema(definition, 0), kind.name(), &mut wrong);
        assert!(wrong.is_empty(), "{wrong:#?}");
    }
}

#[test]
fn the_definitions_have_the_fields_that_are_converted() {
    let all = definitions();
    let names =
        |schema: &Value| schema["properties"].as_object().unwrap().keys().cloned().collect::<BTreeSet<String>>();
    let spec = &schema(&all[0], 0)["properties"]["spec"];
    let rule = &spec["properties"]["rules"]["items"]["properties"];
    let source = names(&rule["from"]["items"]["properties"]["source"]);
    let operation = names(&rule["to"]["items"]["properties"]["operation"]);
    let known = |list: &[&str]| list.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<String>>();
    let http = known(&HTTP);
    let seen: BTreeSet<String> = source.union(&operation).filter(|name| !http.contains(*name)).cloned().collect();
    assert_eq!(seen, known(&SOURCE).union(&known(&OPERATION)).cloned().collect());
    assert!(http.iter().all(|name| source.contains(name) || operation.contains(name)));
    assert_eq!(names(&rule["when"]["items"]), known(&CONDITION));
    assert_eq!(names(spec), known(&super::authorization::FIELDS));
    assert_eq!(names(&schema(&all[1], 0)["properties"]["spec"]), known(&super::authentication::FIELDS));
}
