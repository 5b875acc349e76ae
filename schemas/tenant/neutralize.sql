-- No migration: what a clone must not take along from its original, run in the clone before anybody sees it.

delete from api_keys;
