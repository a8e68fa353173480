BEGIN TRANSACTION;
CREATE TABLE active_policy (
	only INTEGER NOT NULL, 
	policy_id VARCHAR(80) NOT NULL, 
	PRIMARY KEY (only)
);
INSERT INTO "active_policy" VALUES(1,'base-1');
CREATE TABLE policies (
	number INTEGER NOT NULL, 
	id VARCHAR(80) NOT NULL, 
	parent_id VARCHAR(80) NOT NULL, 
	base_source TEXT NOT NULL, 
	base_commit VARCHAR(80) NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	adapter_uri TEXT NOT NULL, 
	adapter_sha256 VARCHAR(64) NOT NULL, 
	kept INTEGER NOT NULL, 
	offered INTEGER NOT NULL, 
	first_loss FLOAT NOT NULL, 
	final_loss FLOAT NOT NULL, 
	steps INTEGER NOT NULL, 
	steps_planned INTEGER NOT NULL, 
	seconds FLOAT NOT NULL, 
	failure_reason VARCHAR(64) NOT NULL, 
	failure_message TEXT NOT NULL, 
	created FLOAT NOT NULL, 
	request BLOB NOT NULL, 
	PRIMARY KEY (number), 
	UNIQUE (id)
);
INSERT INTO "policies" VALUES(1,'base-1','','shipped','c0ffee','ready','','',0,0,0.0,0.0,0,0,0.0,'','',1767312000.0,X'');
INSERT INTO "policies" VALUES(2,'p-1','base-1','shipped','c0ffee','training','','',3,12,0.0,0.0,0,0,0.0,'','',1767398400.0,X'757064617465');
CREATE TABLE policy_groups (
	policy_id VARCHAR(80) NOT NULL, 
	groups INTEGER NOT NULL, 
	groups_dropped INTEGER NOT NULL, 
	PRIMARY KEY (policy_id)
);
INSERT INTO "policy_groups" VALUES('p-1',4,1);
CREATE TABLE requests (
	request_id VARCHAR(200) NOT NULL, 
	body_sha256 VARCHAR(64) NOT NULL, 
	policy_id VARCHAR(80) NOT NULL, 
	PRIMARY KEY (request_id)
);
INSERT INTO "requests" VALUES('r1','230d8358dc8e8890b4c58deeb62912ee2f20357ae92a5cc861b98e68fe31acb5','p-1');
CREATE TABLE update_owners (
	policy_id VARCHAR(80) NOT NULL, 
	owner VARCHAR(256) NOT NULL, 
	PRIMARY KEY (policy_id, owner)
);
INSERT INTO "update_owners" VALUES('p-1','run-1');
CREATE TABLE written_groups (
	"key" VARCHAR(80) NOT NULL, 
	"group" BLOB NOT NULL, 
	PRIMARY KEY ("key")
);
INSERT INTO "written_groups" VALUES('k',X'0067726F7570');
COMMIT;
