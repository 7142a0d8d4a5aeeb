//! Reads JSON only as deep as anything that counts can be. Pure.
//!
//! A definition of a kind that keeps unknown fields lets whoever may write an object nest them without end, and a reader
//! that follows them refuses the whole list in which the object stands.

use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::fmt;

/// Levels that are read. The parts that are known have eight.
const DEPTH: usize = 16;
/// What stands for lists and objects below. It is neither null, which counts as absent, nor any value that is known.
const BELOW: &str = "nested too deeply";

/// Reads a value, in which everything below the first levels is replaced.
pub fn shallow<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Value, D::Error> {
    Level(DEPTH).deserialize(deserializer)
}

/// How many more levels are read.
#[derive(Clone, Copy)]
struct Level(usize);

impl<'de> DeserializeSeed<'de> for Level {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Level {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E: Error>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let Some(below) = self.0.checked_sub(1) else {
            while list.next_element::<IgnoredAny>()?.is_some() {}
            return Ok(BELOW.into());
        };
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(Self(below))? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Value, A::Error> {
        let Some(below) = self.0.checked_sub(1) else {
            while fields.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            return Ok(BELOW.into());
        };
        let mut values = Map::new();
        while let Some(name) = fields.next_key()? {
            values.insert(name, fields.next_value_seed(Self(below))?);
        }
        Ok(Value::Object(values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn read(text: &str) -> Result<Value, serde_json::Error> {
        let mut json = serde_json::Deserializer::from_str(text);
        let value = shallow(&mut json)?;
        json.end().map(|()| value)
    }

    #[test]
    fn what_is_nested_without_end_is_read_to_the_last_level_and_what_stands_beside_it_whole() {
        let levels = 100_000;
        for (open, close, kind) in [("[", "]", "lists"), ("{\"a\":", "}", "objects")] {
            let text = format!("{{\"deep\":{}1{},\"beside\":[true]}}", open.repeat(levels), close.repeat(levels));
            assert!(serde_json::from_str::<Value>(&text).is_err(), "{kind}: the usual reader refuses it");
            let value = read(&text).unwrap();
            assert_eq!(value["beside"], json!([true]), "{kind}");
            let (mut value, mut depth) = (&value["deep"], 1);
            while let Some(inner) = value.get(0).or(value.get("a")) {
                (value, depth) = (inner, depth + 1);
            }
            assert_eq!((value, depth), (&json!(BELOW), DEPTH), "{kind}");
        }
        assert!(read("{\"a\":").is_err());
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::Bool),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<i32>().prop_map(|quarters| (f64::from(quarters) / 4.0).into()),
            "[a\"\\\\ä]{0,3}".prop_map(Value::from),
        ];
        leaf.prop_recursive(16, 40, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[ab]", inner, 0..3).prop_map(|fields| fields.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_not_deep_is_read_as_it_is(value in values()) {
            prop_assert_eq!(read(&value.to_string()).unwrap(), value);
        }
    }
}
