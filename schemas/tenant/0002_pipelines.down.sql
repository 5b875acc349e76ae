drop table records;
drop table fields;
drop table pipelines;
